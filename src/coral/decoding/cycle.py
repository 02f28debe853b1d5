"""The core loop: propose a tree, verify it with one target forward, walk it, keep the path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import Protocol

from coral.decoding.state import Cycle, State
from coral.target.ids import check_scores
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize, read


class Proposer(Protocol):
    """Proposes a draft tree for each sequence. Any tree is lossless; a good one is fast."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The target states that it reads, see `Target.verify`."""
        ...

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        """Trees whose root is each sequence's last token.

        What was accepted since it last drafted is in `State.unread`, which starts with the whole prompt.
        """
        ...


def cycle(target: Target, proposer: Proposer, live: Sequence[State], tree_size: TreeSize) -> list[Cycle]:
    """One cycle of every live sequence: propose, verify, walk, keep."""
    begin = perf_counter()
    trees = [tree.to(target.device) for tree in proposer.propose(live, tree_size)]
    drafted = perf_counter()
    logits, features = target.verify([state.cache for state in live], trees, proposer.layers)
    for state, tree, scores in zip(live, trees, logits, strict=True):
        if state.cycle is None:
            check_scores(target, scores[:1])
        state.tree, state.logits = tree, scores
    trees, samples = read(trees, [state.sample() for state in live])  # the one wait of a cycle on a GPU
    verified = perf_counter()
    each = zip(trees, samples, features, strict=True)
    kept = [state.keep(*its) for state, its in zip(live, each, strict=True)]
    seconds = perf_counter() - begin
    for one in kept:
        one.draft_seconds, one.verify_seconds, one.seconds = drafted - begin, verified - drafted, seconds
    return kept


def generate(
    target: Target, proposer: Proposer, states: Sequence[State], tree_size: TreeSize
) -> Iterator[list[Cycle]]:
    """Write until every sequence is done; yields a cycle for each sequence that was still live.

    The output of each sequence is a fixed function of (prompt, sampling, sequence id): no proposer, tree size
    or batch changes it.
    """
    live = [state for state in states if not state.done]
    for state in live:
        state.prefill(target, proposer.layers)
    while live:
        yield cycle(target, proposer, live, tree_size)
        live = [state for state in live if not state.done]


def acceptance_length(cycles: Iterable[Cycle]) -> float:
    """tau: emitted tokens per cycle, sum over sum, over cycles that the end of the text did not cut."""
    emitted = [len(cycle.tokens) for cycle in cycles if not cycle.cut]
    return sum(emitted) / len(emitted) if emitted else float("nan")
