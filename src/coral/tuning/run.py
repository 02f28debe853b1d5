"""Find the fastest draft tree: record texts, measure costs, try all budgets on paper, then the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from rich.console import Console
from rich.progress import Progress

from coral.bench.methods import sized
from coral.decoding.cycle import Proposer, generate
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.device import has_queue
from coral.errors import CoralError
from coral.target.target import Target
from coral.tree import CPU_DEFAULT, DEFAULT, Budget
from coral.tuning.costs import Costs, measure
from coral.tuning.record import everything, new_state, record
from coral.tuning.simulate import Run, simulate

TOP_K = (1, 2, 3, 4, 6, 8, 10)
MAX_DEPTH = (1, 2, 3, 4, 5, 6, 8, 10)
NUM_NODES = (1, 2, 3, 5, 7, 9, 11, 13, 15, 19, 23, 27, 31, 39, 47, 63)
MIN_GAIN = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # for which cycles are timed
COMPILED_ROWS = (1, 8, 16, 32)  # fewer, since each takes a few seconds a layer to compile


@dataclass(frozen=True)
class Prediction:
    """A budget and what it should do: tokens a second without prefill, and speedup over plain decoding."""

    budget: Budget
    tau: float
    steps: float
    nodes: float
    tokens_per_second: float
    speedup: float


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    candidates: see `fastest`. default: `tree.DEFAULT` or `tree.CPU_DEFAULT`.
    plain: plain decoding, from the same costs.
    predicted: the best budget's speedup, from costs measured anew between the texts that were decoded.
    decoded: tokens a second of the best budget and of plain decoding, when both decode the same prompts.
    """

    candidates: list[Prediction]
    default: Prediction
    plain: Prediction
    predicted: float
    decoded: tuple[float, float]

    @property
    def best(self) -> Prediction:
        return self.candidates[0]

    @property
    def achieved(self) -> float:
        """The best budget's speedup over plain decoding, as measured."""
        return self.decoded[0] / self.decoded[1]

    @property
    def deviation(self) -> float:
        """By how much the achieved speedup differs from the predicted one, as a share of the latter."""
        return self.achieved / self.predicted - 1


def tune(
    target: Target,
    make: Callable[[Target], Proposer],
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    compile: bool = False,
    console: Console | None = None,
) -> Tuned:
    """Find the budget that decodes fastest here with a proposer, and check it by decoding.

    Args:
        target: not compiled; compile=True compiles it for a few sizes of trees.
        make: makes a trained drafter's proposer (`proposers.feature.Feature`) for the target as it runs.
        prompts: token ids. Those that leave no room in the context are left out.

    Raises:
        CoralError: no prompt fits the target's context.
    """
    sampling, console = sampling or Sampling(), console or Console(stderr=True)
    prompts = [ids for ids in prompts if len(ids) + max_new_tokens <= target.context_length]
    if not prompts:
        raise CoralError(
            f"no prompt leaves room for {max_new_tokens} tokens in the target's context of "
            f"{target.context_length}; use shorter prompts or a smaller --max-new-tokens."
        )
    waits = has_queue(target.device)
    with Progress(console=console, transient=True) as progress:
        if compile:
            target = target.compiled(COMPILED_ROWS)
        rows = COMPILED_ROWS if target.pads else ROWS
        proposer = make(target)
        task = progress.add_task("measuring costs", total=2 * len(prompts) + 1)
        costs = measure(target, proposer, max(prompts, key=len), sampling, rows, TOP_K)
        progress.update(task, advance=1, description="recording")
        texts = record(
            sized(target, 1),
            proposer,
            prompts,
            max_new_tokens,
            sampling,
            progress=lambda: progress.advance(task),
        )
        # On a GPU, growth does not stop early: that would have to be waited for.
        gains, default = ((0.0,), replace(DEFAULT, min_gain=0.0)) if waits else (MIN_GAIN, CPU_DEFAULT)
        runs = {run.budget: run for run in simulate(texts, grid(max(rows) - 1, gains))}
        predictions = {budget: _predict(run, costs) for budget, run in runs.items()}
        best = fastest([*predictions.values()])
        progress.update(task, description="decoding")
        chosen = (
            _Decoded(proposer, best[0].budget),
            _Decoded(Plain(), Budget(1, 0, 1)),
        )
        meanwhile = list[Costs]()  # the machine may be faster or slower by now than it was at first
        for index, prompt in enumerate([prompts[0], *prompts]):
            for way in chosen:
                state = new_state(target, prompt, max_new_tokens, sampling, index - 1, way.budget.num_nodes)
                at_size = sized(target, way.budget.num_nodes + 1)
                spent = sum(
                    cycle.seconds for (cycle,) in generate(at_size, way.proposer, [state], way.budget)
                )
                if index > 0:  # the first time warms up, and compiles
                    way.seconds += spent
                    way.tokens += len(state.written)
            if index > 0:
                top_k = best[0].budget.top_k
                meanwhile.append(measure(target, proposer, prompt, sampling, rows, [top_k], repeats=3))
            progress.advance(task)
    predicted = _predict(runs[best[0].budget], Costs.mean(meanwhile)).speedup
    by_cost = Prediction(chosen[1].budget, 1.0, 0.0, 0.0, 1 / costs.plain, 1.0)
    fast, slow = (way.tokens / way.seconds for way in chosen)
    return Tuned(best, predictions[default], by_cost, predicted, (fast, slow))


def grid(most_nodes: int, min_gains: Sequence[float] = MIN_GAIN) -> list[Budget]:
    """The budgets that are compared, the default among them; none has more nodes than can grow."""
    return [
        Budget(top_k, max_depth, num_nodes, min_gain)
        for top_k, max_depth, num_nodes, min_gain in product(TOP_K, MAX_DEPTH, NUM_NODES, min_gains)
        if num_nodes <= min(most_nodes, everything(top_k, max_depth, 0).num_nodes)
        and (max_depth > 1 or min_gain == min_gains[0])  # a single level is always grown
    ]


def fastest(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The fastest of every number of nodes, the fastest first; of budgets that do the same only the first."""
    best: dict[int, Prediction] = {}
    met = set[tuple[float, float, float]]()
    for one in sorted(predictions, key=lambda p: (-p.speedup, p.budget.num_nodes)):
        does = one.tau, one.steps, one.nodes  # a drafter that is never sure fills no larger tree
        if does not in met:
            met.add(does)
            best.setdefault(one.budget.num_nodes, one)
    return list(best.values())


@dataclass
class _Decoded:
    """One way of decoding the prompts, and what it has taken so far."""

    proposer: Proposer
    budget: Budget
    seconds: float = 0.0
    tokens: int = 0


def _predict(run: Run, costs: Costs) -> Prediction:
    speed = run.tokens / costs.seconds(run)
    rows = float((run.rows * torch.arange(len(run.rows))).sum())
    nodes = rows / run.cycles - 1
    return Prediction(run.budget, run.tau, run.steps / run.cycles, nodes, speed, speed * costs.plain)
