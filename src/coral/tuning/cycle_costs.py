"""What a cycle costs on this machine, in two tables that add up to it: drafting, and everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle as endlessly
from itertools import pairwise
from statistics import fmean, median

import torch

from coral.bench.costs import RefusedTree
from coral.decoding.cycle import Proposer, generate
from coral.decoding.row_costs import DEEP, draft_times
from coral.decoding.sampling import Sampling
from coral.decoding.state import State
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize
from coral.tuning.simulate import Simulated

_ALIKE = 8  # trees of one size in a row; the latter half is timed


@dataclass(frozen=True)
class CycleCosts:
    """Seconds of the parts of a cycle.

    cycle: a cycle that drafts nothing (verify, sample, walk, keep), by the rows of its tree.
    first: drafting the first level, which reads the accepted tokens first, by top_k (the width of a level).
    level: drafting each further level, by top_k.
    padded: the target is compiled, so every tree costs what the largest does.
    """

    cycle: dict[int, float]
    first: dict[int, float]
    level: dict[int, float]
    padded: bool

    @classmethod
    def mean(cls, costs: Sequence[CycleCosts]) -> CycleCosts:
        """The mean of costs of the same sizes that were measured at different times."""

        def means(tables: Sequence[dict[int, float]]) -> dict[int, float]:
            return {size: fmean(table[size] for table in tables) for size in tables[0]}

        cycle, first, level = ([getattr(one, part) for one in costs] for part in ("cycle", "first", "level"))
        return cls(means(cycle), means(first), means(level), costs[0].padded)

    @property
    def plain(self) -> float:
        """Seconds of a plain step."""
        return self.cycle[1]

    def of_rows(self, rows: int) -> float:
        """Seconds of a cycle that drafts nothing, linear between the measured sizes."""
        sizes = sorted(self.cycle)
        below, above = next(((a, b) for a, b in pairwise(sizes) if rows <= b), (sizes[-2], sizes[-1]))
        share = (rows - below) / (above - below)
        return (1 - share) * self.cycle[below] + share * self.cycle[above]

    def seconds(self, run: Simulated) -> float:
        """Seconds of decoding with a tree size, without prefill."""
        counts = run.rows.tolist()
        if self.padded:
            counts = [0, counts[1], *[0] * (run.tree_size.num_nodes - 1), sum(counts[2:])]
        verified = sum(count * self.of_rows(rows) for rows, count in enumerate(counts) if count)
        top_k = run.tree_size.top_k
        drafted = run.cycles * self.first[top_k] + max(0, run.steps - run.cycles) * self.level[top_k]
        return verified + drafted


def measure_cycles(
    target: Target,
    proposer: Proposer,
    prompt: list[int],
    sampling: Sampling,
    rows: Sequence[int],
    top_ks: Sequence[int],
    repeats: int = 8,
) -> CycleCosts:
    """Time real cycles and real calls of `propose` behind a prompt, all sizes in turn, and take medians.

    Args:
        rows: sizes of trees, 1 among them. A compiled target must be compiled for them.
        top_ks: for which drafting is timed.
    """
    drafted = draft_times(target, proposer, prompt, sampling, top_ks, repeats + 1)
    first = {k: _median(drafted[k, 1]) for k in top_ks}
    level = {k: max(0.0, _median(drafted[k, DEEP]) - first[k]) / (DEEP - 1) for k in top_ks}
    cycles = _cycle_seconds(target, prompt, sampling, rows, repeats)
    return CycleCosts(cycles, first, level, padded=target.pads)


def that_may_pay(
    target: Target, prompt: list[int], sampling: Sampling, rows: Sequence[int], tau: float
) -> Sequence[int]:
    """Of ascending sizes of trees those up to the first that takes longer than `tau` plain steps. Where no
    tree yields more tokens a cycle, no larger one can pay, and to time it may take minutes.
    """
    if target.pads:
        return rows
    for place, n in enumerate(rows[1:], 2):
        seconds = _cycle_seconds(target, prompt, sampling, (1, n), repeats=1)
        if seconds[n] > tau * seconds[1]:
            return rows[:place]
    return rows


class _Refused:
    """Proposes trees of depth 1 of the given sizes in turn, none of whose nodes is accepted."""

    layers = ()

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = endlessly(sizes)

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        n = next(self.sizes)
        parents = torch.tensor([-1] + [0] * (n - 1))
        return [RefusedTree(torch.full((n,), state.tokens[-1]), parents, torch.zeros(n)) for state in states]


def _cycle_seconds(
    target: Target, prompt: list[int], sampling: Sampling, rows: Sequence[int], repeats: int
) -> dict[int, float]:
    # Sizes come in groups, as in a text: a plain step right after a tree of 64 rows takes longer than usual.
    in_a_row = [n for n in rows for _ in range(_ALIKE)]
    room = min(max(1, repeats // 4) * len(in_a_row), target.context_length - len(prompt) - 1)
    state = State.begin(target, prompt, room, max(rows), sampling=sampling)
    times: dict[int, list[float]] = {n: [] for n in rows}
    cycles = generate(target, _Refused(in_a_row), [state], TreeSize(1, 1, max(rows)))
    for index, (n, (cycle,)) in enumerate(zip(endlessly(in_a_row), cycles, strict=False)):
        if index % _ALIKE >= _ALIKE // 2:
            times[n].append(cycle.seconds - cycle.draft_seconds)
    return {n: median(seconds) for n, seconds in times.items()}


def _median(seconds: Sequence[float]) -> float:
    """Their median without the first, which warms up."""
    return median(seconds[1:] or seconds)
