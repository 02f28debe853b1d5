"""Plain steps while drafting does not pay: a drafter that misses costs time, never more than a few percent.

A cycle that drafts takes as long as some number of plain steps; drafting pays while it emits at least as many
tokens. Both are measured on the way, in seconds, so that whatever makes drafting dear counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean, median

from coral.decoding.cycle import Proposer
from coral.decoding.state import State
from coral.tree import DraftTree, TreeSize

_NEARLY = 0.9
"""The tokens of eight cycles tell no finer what all will bring: without it a drafter that gains a little
rests half of the time."""


class Fallback:
    """Lets `proposer` draft, and takes plain steps for a while where that was slower than they are.

    What plain steps leave unread the proposer reads when it drafts again. Each rest is twice
    as long as the last, until drafting pays.

    Args:
        window: cycles that are judged together; a quarter of them where drafting did not pay the last time.
        probe: plain steps taken to learn what one costs.
        first_rest, longest_rest: in plain steps.
    """

    def __init__(
        self,
        proposer: Proposer,
        window: int = 8,
        probe: int = 2,
        first_rest: int = 16,
        longest_rest: int = 512,
    ) -> None:
        self.proposer, self.window, self.probe, self.layers = proposer, window, probe, proposer.layers
        self.first_rest, self.longest_rest = first_rest, longest_rest
        self._drafted: deque[tuple[float, float]] = deque(maxlen=window)  # seconds, tokens a sequence
        self._plain: deque[float] = deque(maxlen=window)  # seconds
        self._rest, self._next_rest = 0, first_rest

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        self._learn(states)
        drafts = not self._rests()
        for state in states:
            state.memory[self] = drafts, len(state.tokens)
        if drafts:
            return self.proposer.propose(states, tree_size)
        return [DraftTree.root(state.tokens[-1]) for state in states]

    def _learn(self, states: Sequence[State]) -> None:
        """Note what the last cycle of these sequences took and brought, if they shared one that was asked of
        this proposer: a server takes plain steps of its own where many texts are live.
        """
        cycles = [state.cycle for state in states]
        drafted = {self._drafts(state) for state in states}
        if None in cycles or len(drafted) > 1 or None in drafted:
            return
        seconds = fmean(cycle.seconds for cycle in cycles if cycle)
        if True in drafted:
            self._drafted.append((seconds, fmean(len(cycle.tokens) for cycle in cycles if cycle)))
        else:
            self._plain.append(seconds)

    def _drafts(self, state: State) -> bool | None:
        """Whether the text's last cycle drafted; None: it was not asked of this proposer."""
        drafts, length = state.memory.get(self, (None, 0))
        return drafts if state.cycle and length + len(state.cycle.tokens) == len(state.tokens) else None

    def _rests(self) -> bool:
        """Whether this cycle is to be a plain step."""
        needed = self.window if self._next_rest == self.first_rest else max(1, self.window // 4)
        if self._rest == 0 and len(self._drafted) >= needed:
            if not self._plain:
                self._rest = self.probe
            elif self.pays:
                self._next_rest = self.first_rest
            else:
                self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, self.longest_rest)
                self._drafted.clear()
        self._rest, rests = max(0, self._rest - 1), self._rest > 0
        return rests

    @property
    def pays(self) -> bool:
        """Whether the last cycles emitted nearly the tokens that plain steps would have in that time."""
        seconds, tokens = zip(*self._drafted, strict=True)
        return fmean(tokens) * median(self._plain) >= _NEARLY * median(seconds)
