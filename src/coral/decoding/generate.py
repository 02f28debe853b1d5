"""The core loop: propose a tree, verify it with one target forward, walk it, keep the path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import Protocol

from coral.decoding.state import Committed, Cycle, State
from coral.target.target import Target
from coral.tree import Budget, DraftTree, read


class Proposer(Protocol):
    """Proposes a draft tree for each sequence. Any tree is lossless; a good one is fast."""

    def propose(
        self, states: Sequence[State], committed: Sequence[Committed], budget: Budget
    ) -> list[DraftTree]:
        """Trees whose root is each sequence's last token.

        `committed` is what was accepted since the last call, which starts with the whole prompt.
        """
        ...


def generate(
    target: Target, proposer: Proposer, states: Sequence[State], budget: Budget
) -> Iterator[list[Cycle]]:
    """Write until every sequence is done; yields a cycle for each sequence that was still live.

    The output of each sequence is a fixed function of (prompt, sampling, sequence id): no proposer, budget or
    batch changes it.
    """
    live = [state for state in states if not state.done]
    for state in live:
        state.rewind()  # nothing to drop, unless an earlier run was interrupted
    committed = target.prefill(live)
    while live:
        begin = perf_counter()
        trees = [tree.to(target.device) for tree in proposer.propose(live, committed, budget)]
        for state, rows in zip(live, committed, strict=True):
            state.rows_read = rows.start + len(rows.tokens)
        drafted = perf_counter()
        logits, features = target.verify(live, trees)
        for state, tree, scores in zip(live, trees, logits, strict=True):
            state.tree, state.logits = tree, scores
        written = [state.sample() for state in live]
        trees, samples = read(trees, written)
        verified = perf_counter()
        paths, outcomes = [], []
        for state, tree, sample in zip(live, trees, samples, strict=True):
            path = tree.walk(sample)
            emitted = [sample[node] for node in path]
            taken = state.extend(emitted)
            paths.append(path[:taken])  # the end may fall inside the path: the cache is cut there too
            outcomes.append((tree, emitted[:taken], len(path) - 1, taken < len(emitted)))
        committed = target.keep(live, paths, features)
        times = (drafted - begin, verified - drafted, perf_counter() - begin)
        for state, (tree, tokens, accepted, cut) in zip(live, outcomes, strict=True):
            nodes, depth = len(tree) - 1, tree.max_depth
            state.cycle = Cycle(tokens, nodes, accepted, depth, tree.num_forwards, cut, *times)
        yield [state.cycle for state in live if state.cycle]
        kept = [(state, rows) for state, rows in zip(live, committed, strict=True) if not state.done]
        live, committed = [state for state, _ in kept], [rows for _, rows in kept]


def acceptance_length(cycles: Iterable[Cycle]) -> float:
    """tau: emitted tokens per cycle, sum over sum, over cycles that the end of the text did not cut."""
    emitted = [len(cycle.tokens) for cycle in cycles if not cycle.cut]
    return sum(emitted) / len(emitted) if emitted else float("nan")
