"""Plain steps while drafting does not pay: a drafter that misses costs time, never more than a few percent.

A cycle that drafts takes as long as some number of plain steps; drafting pays while it emits at least as many
tokens. Both are measured on the way, in seconds, so that whatever makes drafting dear counts, and apart for
each number of sequences: what pays for one text may cost a batch more than it brings.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
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
        self.proposer, self.layers = proposer, proposer.layers
        # By the number of sequences in a cycle.
        self.records = defaultdict[int, Record](partial(Record, window, probe, first_rest, longest_rest))

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        self._learn(states)
        record = self.records[len(states)]
        drafts = not record.rests()
        for state in states:
            state.memory[self] = drafts, record, len(state.tokens)
        if drafts:
            return self.proposer.propose(states, tree_size)
        return [DraftTree.root(state.tokens[-1]) for state in states]

    def _learn(self, states: Sequence[State]) -> None:
        """Note what the last cycle took and brought, if one that was asked of this proposer was shared by all
        but newcomers: a server admits texts between cycles, and takes plain steps of its own.
        """
        shared, cycles = set(), []
        for state in states:
            drafts, record, length = state.memory.get(self, (False, None, 0))
            if record and state.cycle and length + len(state.cycle.tokens) == len(state.tokens):
                shared.add((drafts, record))
                cycles.append(state.cycle)
        if len(shared) == 1:
            ((drafts, record),) = shared
            seconds, tokens = fmean(cycle.seconds for cycle in cycles), fmean(len(c.tokens) for c in cycles)
            record.note(drafts, seconds, tokens)


class Record:
    """What the last cycles of so many sequences took and brought, and how long they rest; see `Fallback`."""

    def __init__(self, window: int, probe: int, first_rest: int, longest_rest: int) -> None:
        self.window, self.probe = window, probe
        self.first_rest, self.longest_rest = first_rest, longest_rest
        self.drafted = deque[tuple[float, float]](maxlen=window)  # seconds, tokens a sequence
        self.plain = deque[float](maxlen=window)  # seconds
        self._rest, self._next_rest = 0, first_rest

    def note(self, drafts: bool, seconds: float, tokens: float) -> None:
        if drafts:
            self.drafted.append((seconds, tokens))
        else:
            self.plain.append(seconds)

    def rests(self) -> bool:
        """Whether this cycle is to be a plain step."""
        needed = self.window if self._next_rest == self.first_rest else max(1, self.window // 4)
        if self._rest == 0 and len(self.drafted) >= needed:
            if not self.plain:
                self._rest = self.probe
            elif self.pays:
                self._next_rest = self.first_rest
            else:
                self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, self.longest_rest)
                self.drafted.clear()
        self._rest, rests = max(0, self._rest - 1), self._rest > 0
        return rests

    @property
    def pays(self) -> bool:
        """Whether the last cycles emitted nearly the tokens that plain steps would have in that time."""
        seconds, tokens = zip(*self.drafted, strict=True)
        return fmean(tokens) * median(self.plain) >= _NEARLY * median(seconds)
