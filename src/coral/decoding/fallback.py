"""As much drafting as pays: a drafter that misses costs time, never more than a few percent.

A cycle that drafts takes as long as some number of plain steps; drafting pays while it emits at least as many
tokens. Both are measured on the way, in seconds, so that whatever makes drafting dear counts, and apart for
each number of sequences: what pays for one text may cost a batch more than it brings. In a batch trees are
first cut down to nodes that are worth their row, by what rows cost here and what drafts have promised.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import islice
from statistics import fmean, median
from typing import Any, NamedTuple

from coral.decoding.cycle import Proposer
from coral.decoding.promises import Promises
from coral.decoding.row_costs import RowCosts
from coral.decoding.state import State
from coral.tree import DraftTree, TreeSize

_NEARLY = 0.9
"""The tokens of eight cycles of one text tell no finer what all will bring: without it a drafter that gains a
little rests half of the time. Those of several texts do."""
_NOTED = 4  # trees of a cycle that are learnt from; a batch has enough of them in time
_AGAIN = 16  # trees
_LONG = 64  # plain steps of a rest that costs tell to take; where drafts are known, the longest rest
_KNOWN = 64  # trees


class Asked(NamedTuple):
    """What a sequence's last cycle was asked to do: with which `min_gain` it drafts; None: it rests.

    length: of its text before the cycle.
    """

    record: Record
    length: int
    min_gain: float | None


class Fallback:
    """Lets `proposer` draft, and takes plain steps for a while where that was slower than they are.

    What plain steps leave unread the proposer reads when it drafts again. Each rest is twice as long as the
    last, until drafting pays.

    Args:
        costs: called once, when several sequences come together for the first time; None: their trees are not
            cut down, as on a GPU, where rows cost little and to look at a tree is to wait.
        window: cycles that are judged together; a quarter of them where drafting did not pay the last time.
        probe: plain steps taken to learn what one costs.
        first_rest, longest_rest: in plain steps.
    """

    def __init__(
        self,
        proposer: Proposer,
        costs: Callable[[], RowCosts] | None = None,
        window: int = 8,
        probe: int = 2,
        first_rest: int = 16,
        longest_rest: int = 512,
    ) -> None:
        self.proposer, self.layers, self.promises = proposer, proposer.layers, Promises()
        self._ask_costs = costs
        self._chosen = dict[int, tuple[Any, tuple[TreeSize, bool]]]()
        # By the number of sequences in a cycle.
        self.records = defaultdict[int, Record](partial(Record, window, probe, first_rest, longest_rest))

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        self._learn(states)
        live, record, promising = len(states), self.records[len(states)], True
        if live > 1 and self.costs is not None:
            tree_size, promising = self._best(live, tree_size)
        known = self.promises.noted >= _KNOWN
        drafts = not record.rests(promising, least=record.longest_rest if known else _LONG)
        for state in states:
            state.memory[self] = Asked(record, len(state.tokens), tree_size.min_gain if drafts else None)
        if drafts:
            return self.proposer.propose(states, tree_size)
        return [DraftTree.root(state.tokens[-1]) for state in states]

    def _best(self, live: int, tree_size: TreeSize) -> tuple[TreeSize, bool]:
        """`Promises.best`, looked for again once more trees were learnt from."""
        assert self.costs is not None
        asked = live, tree_size, self.promises.noted // _AGAIN
        if self._chosen.get(live, (None,))[0] != asked:
            self._chosen[live] = asked, self.promises.best(self.costs, live, tree_size)
        return self._chosen[live][1]

    @cached_property
    def costs(self) -> RowCosts | None:
        return self._ask_costs and self._ask_costs()

    def _learn(self, states: Sequence[State]) -> None:
        """Note what the last cycle took and brought, if one that was asked of this proposer was shared by all
        but newcomers: a server admits texts between cycles, and takes plain steps of its own.
        """
        shared = [
            (state, asked)
            for state in states
            if (asked := state.memory.get(self))
            and state.cycle
            and asked.length + len(state.cycle.tokens) == len(state.tokens)
        ]
        if len({(asked.record, asked.min_gain) for _, asked in shared}) == 1:
            cycles, (record, _, min_gain) = [state.cycle for state, _ in shared if state.cycle], shared[0][1]
            seconds, tokens = fmean(cycle.seconds for cycle in cycles), fmean(len(c.tokens) for c in cycles)
            record.note(min_gain is not None, seconds, tokens, len(cycles))
        for state, (_, _, min_gain) in islice(shared, _NOTED if self._ask_costs else 0):
            if min_gain is not None and state.tree is not None and state.cycle:
                self.promises.note(state.tree, state.cycle.num_accepted, min_gain)


class Record:
    """What the last cycles of so many sequences took and brought, and how long they rest; see `Fallback`."""

    def __init__(self, window: int, probe: int, first_rest: int, longest_rest: int) -> None:
        self.window, self.probe = window, probe
        self.first_rest, self.longest_rest = first_rest, longest_rest
        self.drafted = deque[tuple[float, float]](maxlen=window)  # seconds, tokens a sequence
        self.plain = deque[float](maxlen=window)  # seconds
        self.live = 1
        self._rest, self._next_rest = 0, first_rest

    def note(self, drafts: bool, seconds: float, tokens: float, live: int = 1) -> None:
        self.live = live
        if drafts:
            self.drafted.append((seconds, tokens))
        else:
            self.plain.append(seconds)

    def rests(self, promising: bool = True, least: int = 0) -> bool:
        """Whether this cycle is to be a plain step.

        promising: drafting is expected to pay; where it is not, a rest has `least` steps.
        """
        again = self._next_rest > self.first_rest
        needed = max(1, self.window // 4) if again else self.window if promising else 0
        if self._rest == 0 and len(self.drafted) >= needed:
            if promising and not self.plain:
                self._rest = self.probe
            elif promising and self.pays:
                self._next_rest = self.first_rest
            else:
                self._rest = self._next_rest if promising else max(self._next_rest, least)
                self._next_rest = min(2 * self._rest, self.longest_rest)
                self.drafted.clear()
        self._rest, rests = max(0, self._rest - 1), self._rest > 0
        return rests

    @property
    def pays(self) -> bool:
        """Whether the last cycles emitted nearly the tokens that plain steps would have in that time."""
        seconds, tokens = zip(*self.drafted, strict=True)
        nearly = _NEARLY if self.live == 1 else 1.0
        return fmean(tokens) * median(self.plain) >= nearly * median(seconds)
