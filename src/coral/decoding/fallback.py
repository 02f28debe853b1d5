"""Plain steps while drafting does not pay: a drafter that misses costs time, never more than a few percent.

A cycle that drafts takes as long as some number of plain steps; drafting pays while it emits at least as many
tokens. Both are measured on the way, in seconds, so that whatever makes drafting dear counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from coral.decoding.generate import Proposer
from coral.decoding.inner import ask
from coral.decoding.state import Committed, State
from coral.tree import Budget, DraftTree

_NEARLY = 0.9
"""The tokens of eight cycles tell no finer what all will bring: without it a drafter that gains a little
rests half of the time."""


class Fallback:
    """Lets `proposer` draft, and takes plain steps for a while where that was slower than they are.

    What plain steps commit is kept for the proposer, which reads it when it drafts again. Each rest is twice
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
        self.proposer, self.window, self.probe = proposer, window, probe
        self.first_rest, self.longest_rest = first_rest, longest_rest
        self._drafted: deque[tuple[float, float]] = deque(maxlen=window)  # seconds, tokens a sequence
        self._plain: deque[float] = deque(maxlen=window)  # seconds
        self._rest, self._next_rest = 0, first_rest

    def propose(
        self, states: Sequence[State], committed: Sequence[Committed], budget: Budget
    ) -> list[DraftTree]:
        memories = [s.memory if isinstance(s.memory, _Memory) else _Memory() for s in states]
        self._learn(states, memories)
        drafts = not self._rests()
        for state, memory, pairs in zip(states, memories, committed, strict=True):
            memory.waiting.append(pairs)
            memory.drafts = drafts
            state.memory = memory
        if not drafts:
            return [DraftTree.root(state.tokens[-1]) for state in states]
        waiting = [Committed.joined(memory.waiting) for memory in memories]
        trees = ask(self.proposer, "inner", states, waiting, budget)
        for memory in memories:
            memory.waiting.clear()
        return trees

    def _learn(self, states: Sequence[State], memories: Sequence[_Memory]) -> None:
        """Note what the last cycle of these sequences took and brought, if they shared one."""
        cycles = [state.cycle for state in states]
        if None in cycles or len({memory.drafts for memory in memories}) > 1:
            return
        seconds = fmean(cycle.seconds for cycle in cycles if cycle)
        if memories[0].drafts:
            self._drafted.append((seconds, fmean(len(cycle.tokens) for cycle in cycles if cycle)))
        else:
            self._plain.append(seconds)

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


@dataclass
class _Memory:
    """The proposer's own memory of a sequence, what it has yet to read, and whether it drafted last."""

    inner: Any = None
    waiting: list[Committed] = field(default_factory=list)
    drafts: bool = True
