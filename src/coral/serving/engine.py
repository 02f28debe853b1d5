"""Continuous batching: texts come and leave between cycles, and each is what it would be alone.

Rows of all texts stand packed in one forward, none is padded to another, and the sampler's noise knows a text
by its seed and sequence id. So what a text says is a fixed function of its own request: natively bit for bit,
elsewhere up to the rounding of another batch shape, which float32 hardly ever and bfloat16 sometimes shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

from coral.cache import KVCache
from coral.decoding.cycle import Proposer, cycle
from coral.decoding.plain import Willing
from coral.decoding.state import Cycle, State
from coral.errors import CoralError
from coral.target.ids import check_ids
from coral.target.target import Target
from coral.tree import TreeSize

AT_ONCE = 16
_WORTH = 16  # rows that two texts share, from which on to copy them is cheaper than to read them


class Engine:
    """Writes the texts that were submitted; belongs to one thread.

    Args:
        proposer: a `Fallback` lets trees shrink while more texts are live, down to plain steps.
        at_once: texts that are read and written at once; others wait in the order in which they came.
        memory: bytes for keys and values, of the texts at once and of those kept; None: not bounded. A text
            takes those of its longest end when it is admitted, so none is ever stopped for want of memory.
        chunk: tokens of prompts that are read between two cycles.
        kept: finished texts whose keys and values stay, for prompts that begin as they do.

    Attributes:
        prompt_tokens, reused_tokens: of all prompts that were read, and those copied from another text.
        padded_rows: rows of forwards that are no text's; 0 where forwards are not of fixed shape.
    """

    def __init__(
        self,
        target: Target,
        proposer: Proposer,
        tree_size: TreeSize,
        at_once: int = AT_ONCE,
        memory: float | None = None,
        chunk: int = 256,
        kept: int = 16,
    ) -> None:
        if min(at_once, chunk) < 1 or kept < 0:
            raise CoralError("at_once and chunk must be at least 1, and kept at least 0.")
        self.target, self.proposer, self.tree_size = target, proposer, tree_size
        self._willing = Willing(proposer)
        self.at_once, self.memory = at_once, memory
        self.chunk, self.kept = chunk, kept
        self.prompt_tokens = self.reused_tokens = self.padded_rows = 0
        self._waiting, self._reading = deque[State](), deque[State]()
        self._live, self._kept = list[State](), list[State]()  # kept: the one that was of use last at the end
        self._row_bytes = 0.0 if memory is None else _row_bytes(target, proposer)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts whose prompt is read, or that are written."""
        return len(self._reading) + len(self._live)

    @property
    def used(self) -> float:
        """Bytes of keys and values that are taken; 0 where memory is not bounded."""
        return sum(map(self._bytes, chain(self._reading, self._live, self._kept)))

    def check(self, state: State) -> None:
        """Raise CoralError for a text that can never be written: it is at its end, does not fit into the
        memory, or holds ids that the target has no rows for. May be asked on any thread.
        """
        check_ids(self.target, state.tokens)
        if state.done:
            raise CoralError("the text is at its end: nothing may be written behind it.")
        if self.memory is not None and self._bytes(state) > self.memory:
            raise CoralError(
                f"a text of {state.max_length} tokens takes {self._bytes(state) / 1e9:.3g} GB of keys and "
                f"values, but {self.memory / 1e9:.3g} GB are there for all; ask for fewer tokens."
            )

    def submit(self, state: State) -> None:
        """Have a text written, which has yet to begin or goes on; its caches are then the engine's.

        Raises:
            CoralError: see `check`.
        """
        self.check(state)
        self._waiting.append(state)

    def cancel(self, state: State) -> None:
        """Write no more of a text; its place is free for the next cycle."""
        for texts in (self._waiting, self._reading, self._live):
            if state in texts:
                texts.remove(state)

    def clear(self) -> None:
        """Forget all texts, as after a step that failed: which of them was at fault is not known."""
        for texts in (self._waiting, self._reading, self._live, self._kept):
            texts.clear()

    def step(self) -> list[tuple[State, Cycle]]:
        """Read a chunk of prompts, then let every text that is read take a cycle; these, text by text.

        Raises:
            CoralError: the target gives scores that mean nothing; see `clear`.
        """
        while self._waiting and self.running < self.at_once and self._fits(self._waiting[0]):
            state = self._waiting.popleft()
            state.open(self.target, self.proposer.layers)
            self.prompt_tokens += len(state.tokens)
            self._reading.append(state)
        self._read()
        if not (live := self._live):
            return []
        events = [*zip(live, cycle(self.target, self._willing, live, self.tree_size), strict=True)]
        self.padded_rows += self.target.padding([1 + each.num_drafted for _, each in events])
        self._live = [state for state in live if not state.done]
        for state in live:
            if state.done:
                self._keep(state)
        return events

    def write(self, admit: Callable[[], State | None]) -> Iterator[State]:
        """Write texts to their ends and yield each when it is done.

        `admit` gives the next one, or None while there is none; it is asked again after every cycle.
        """
        while True:
            while self.waiting + self.running < self.at_once and (state := admit()):
                self.submit(state)
            if not self.waiting + self.running:
                return
            yield from (state for state, _ in self.step() if state.done)

    def _read(self) -> None:
        """Read prompts in turn, so that a short one waits for one chunk of a long one and not for all."""
        left = self.chunk
        while self._reading and left > 0:
            state = self._reading[0]
            self._reuse(state)
            before = state.unread.end
            more = state.read(self.target, left)
            left -= state.unread.end - before
            self._reading.popleft()
            (self._reading if more else self._live).append(state)

    def _reuse(self, state: State) -> None:
        """Copy what another text has of the prompt, where that is more than was read of it."""
        others = [other for other in chain(self._kept, self._live, self._reading) if other is not state]
        shared = [state.shares(other) for other in others]
        rows = max(shared, default=0)
        gained = rows - state.unread.end
        if gained >= _WORTH:
            source = others[shared.index(rows)]
            state.take(source, rows)
            self.reused_tokens += gained
            if source in self._kept:
                self._kept.remove(source)
                self._kept.append(source)

    def _keep(self, state: State) -> None:
        """Keep the keys and values of a finished text, in place of those of texts that it goes on with."""
        kept = [old for old in self._kept if old.tokens != state.tokens[: len(old.tokens)]]
        self._kept = [*kept, _without_scores(state)][-self.kept :] if self.kept else []

    def _fits(self, state: State) -> bool:
        """Whether there is memory for a text, perhaps once texts that are only kept have gone."""
        if self.memory is None:
            return True
        needed = self._bytes(state) - self.memory
        while self._kept and self.used + needed > 0:
            del self._kept[0]
        return self.used + needed <= 0

    def _bytes(self, state: State) -> float:
        return self._row_bytes * state.cache.capacity


def _without_scores(state: State) -> State:
    """A text as a source of rows: its keys and values, and no logits or tables of a drafter."""
    memory = {proposer: cache for proposer, cache in state.memory.items() if isinstance(cache, KVCache)}
    return replace(
        state, tokens=[*state.tokens], memory=memory, tree=None, logits=None, stop=None, log_probs=None
    )


def _row_bytes(target: Target, proposer: Proposer) -> float:
    """Bytes that a token takes in the target's cache, the drafter's, and as a state that it has yet to read;
    found with a text of two tokens.
    """
    state = State.begin(target, [0, 0], 2, 1)
    state.prefill(target, proposer.layers or (-1,))
    unread = state.unread.features
    proposer.propose([state], TreeSize(1, 1, 1))
    caches = [state.cache, *(cache for cache in state.memory.values() if isinstance(cache, KVCache))]
    return sum(cache.row_bytes for cache in caches) + unread.element_size() * unread.shape[1]
