"""Find the fastest draft tree: record texts, measure costs, try all tree sizes on paper, then the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from coral.decoding import row_costs
from coral.decoding.cycle import Proposer, generate
from coral.decoding.plain import Plain
from coral.decoding.row_costs import RowCosts
from coral.decoding.sampling import Sampling
from coral.decoding.state import State
from coral.device import has_queue
from coral.drafters import tuned
from coral.drafters.drafting import Drafting
from coral.errors import CoralError
from coral.locks import locked
from coral.suites.prompts import Prompt, render
from coral.target.target import Target
from coral.tree import CPU_DEFAULT, DEFAULT, TreeSize
from coral.tuning.cycle_costs import CycleCosts, measure_cycles, that_may_pay
from coral.tuning.recording import everything, new_state, record
from coral.tuning.simulate import Simulated, simulate

TOP_K = (1, 2, 3, 4, 6, 8, 10)
MAX_DEPTH = (1, 2, 3, 4, 5, 6, 8, 10)
NUM_NODES = (1, 2, 3, 5, 7, 9, 11, 13, 15, 19, 23, 27, 31, 39, 47, 63)
MIN_GAIN = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # for which cycles are timed
PLAIN = TreeSize(1, 0, 1)
GRAPH_ROWS = (1, 8, 16, 32)  # fewer, since each takes a few seconds a layer to compile


PROMPTS = (
    "How do I keep bread fresh for longer?",
    "What is the difference between weather and climate?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Give me five ideas for a birthday present for my grandmother.",
    "Explain to a ten-year-old why the sky is blue.",
    "Write a polite email that asks a colleague to move a meeting to Friday.",
    "A pen costs 3 dollars. Anna buys 7 pens and pays with 50 dollars. How much does she get back?",
    "A tank holds 240 litres and loses 8 litres an hour. After how many hours is it half empty?",
    "Solve 3x + 7 = 25 and explain each step.",
    "Write a Python function that reverses the words of a sentence.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "Write a SQL query that lists the ten customers with the highest total of orders.",
    "Summarise how photosynthesis works in three sentences.",
    "List the planets of the solar system with one fact about each.",
    "What should I see in Rome in two days?",
    "Rewrite this sentence so that it is easier to read: The utilisation of bicycles is to be encouraged.",
)
"""General prompts, which are in none of the benchmarks' suites."""


@dataclass(frozen=True)
class Prediction:
    """A tree size with its predicted tokens a second (without prefill) and speedup over plain decoding."""

    tree_size: TreeSize
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
    predicted: the best tree size's speedup, from costs measured anew between the texts that were decoded.
    decoded: tokens a second of the best tree size and of plain decoding, when both decode the same prompts.
    costs: what the proposer's cycles cost.
    """

    candidates: list[Prediction]
    default: Prediction
    plain: Prediction
    predicted: float
    decoded: tuple[float, float]
    costs: CycleCosts
    proposer: Proposer

    @property
    def best(self) -> Prediction:
        return self.candidates[0]

    @property
    def achieved(self) -> float:
        """The best tree size's speedup over plain decoding, as measured."""
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
    console: Console | None = None,
) -> Tuned:
    """Find the tree size that decodes fastest here with a proposer, and check it by decoding.

    Args:
        target: on any backend; graphs of `GRAPH_ROWS`.
        make: makes a trained drafter's proposer (`proposers.feature.Feature`) for the target as it runs.
        prompts: token ids. Those that leave no room in the context are left out.

    Raises:
        CoralError: no prompt fits the target's context.
    """
    sampling, console = sampling or Sampling(), console or Console(stderr=True)
    prompts = _fitting(target, prompts, max_new_tokens)
    rows: Sequence[int] = GRAPH_ROWS if target.pads else ROWS
    proposer = make(target)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("recording", total=2 * len(prompts) + 1)
        told = partial(progress.advance, task)
        texts = record(target.sized(1), proposer, prompts, max_new_tokens, sampling, progress=told)
        gains, default = _compared(target)
        runs = {run.tree_size: run for run in simulate(texts, grid(max(rows) - 1, gains))}
        progress.update(task, description="measuring costs")
        longest, most = max(prompts, key=len), max(run.tau for run in runs.values())
        rows = that_may_pay(target, longest, sampling, rows, most)
        costs = measure_cycles(target, proposer, longest, sampling, rows, TOP_K)
        told()
        predictions = {tree_size: _predict(run, costs) for tree_size, run in runs.items()}
        candidates = fastest([*predictions.values()])
        best = candidates[0].tree_size
        progress.update(task, description="decoding")
        ways = _Decoded(proposer, best), _Decoded(Plain(), PLAIN)
        meanwhile = list[CycleCosts]()  # the machine may be faster or slower by now than it was at first
        for index, prompt in enumerate([prompts[0], *prompts]):
            for way in ways:
                state = new_state(
                    target, prompt, max_new_tokens, sampling, index - 1, way.tree_size.num_nodes
                )
                way.write(target, state, counted=index > 0)  # the first time warms up, and compiles
            if index > 0:
                meanwhile.append(
                    measure_cycles(target, proposer, prompt, sampling, rows, [best.top_k], repeats=3)
                )
            told()
    predicted = _predict(runs[best], CycleCosts.mean(meanwhile)).speedup
    plain = Prediction(PLAIN, 1.0, 0.0, 0.0, 1 / costs.plain, 1.0)
    fast, slow = (way.tokens / way.seconds for way in ways)
    return Tuned(candidates, predictions[default], plain, predicted, (fast, slow), costs, proposer)


def tune_drafter(
    target: Target,
    directory: Path,
    head: str,
    prompts: Sequence[list[int]],
    *,
    write: bool = True,
    **options: Any,
) -> tuple[Tuned, Path | None]:
    """Tune the drafter in `directory` with one of its heads, and write the tree into it.

    Args:
        write: without it nothing is written.
        options: see `tune`.

    Returns:
        What was found, and the file that now holds the tree.

    Raises:
        CoralError: see `tune`; a file of trees that cannot be read, or a drafter that another process writes.
    """
    conditions = tuned.Conditions.of(target, head)
    with locked(directory) if write else nullcontext():
        tuned.find(directory, conditions)  # a file that cannot be read is refused before minutes of work
        make = Drafting(directory, head, fallback=False).proposer
        found = tune(target, make, prompts, **options)
        if not write:
            return found, None
        # A batch of texts, too, goes by what was measured here.
        row_costs.note(target, found.proposer, RowCosts(found.costs.cycle, found.costs.level))
        return found, tuned.save(directory, conditions, found.best.tree_size, found.predicted, found.achieved)


def general_prompts(target: Target) -> list[list[int]]:
    """`PROMPTS` as the target is asked them."""
    return [render(target.tokenizer, Prompt("", "", (text,))) for text in PROMPTS]


def _fitting(target: Target, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The prompts that leave room in the target's context.

    Raises:
        CoralError: none does.
    """
    fitting = [ids for ids in prompts if len(ids) + max_new_tokens <= target.context_length]
    if not fitting:
        raise CoralError(
            f"no prompt leaves room for {max_new_tokens} tokens in the target's context of "
            f"{target.context_length}; use shorter prompts or a smaller --max-new-tokens."
        )
    return fitting


def _compared(target: Target) -> tuple[Sequence[float], TreeSize]:
    """The values of `min_gain` that are compared, and the built-in tree_size, among them."""
    if has_queue(target.device):  # growth does not stop early there: it would wait for the scores
        return (0.0,), replace(DEFAULT, min_gain=0.0)
    return MIN_GAIN, CPU_DEFAULT


def grid(most_nodes: int, min_gains: Sequence[float] = MIN_GAIN) -> list[TreeSize]:
    """The tree sizes that are compared, the default among them; none has more nodes than can grow."""
    return [
        TreeSize(top_k, max_depth, num_nodes, min_gain)
        for top_k, max_depth, num_nodes, min_gain in product(TOP_K, MAX_DEPTH, NUM_NODES, min_gains)
        if num_nodes <= min(most_nodes, everything(top_k, max_depth, 0).num_nodes)
        and (max_depth > 1 or min_gain == min_gains[0])  # a single level is always grown
    ]


def fastest(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The fastest of each number of nodes, fastest first. Of tree sizes that draft alike one is kept."""
    best: dict[int, Prediction] = {}
    met = set[tuple[float, float, float]]()
    for one in sorted(predictions, key=lambda p: (-p.speedup, p.tree_size.num_nodes)):
        does = one.tau, one.steps, one.nodes  # a drafter that is never sure fills no larger tree
        if does not in met:
            met.add(does)
            best.setdefault(one.tree_size.num_nodes, one)
    return list(best.values())


@dataclass
class _Decoded:
    """One way of decoding the prompts, with its seconds and tokens so far."""

    proposer: Proposer
    tree_size: TreeSize
    seconds: float = 0.0
    tokens: int = 0

    def write(self, target: Target, state: State, counted: bool) -> None:
        """Write a text, and count its time and tokens if asked to."""
        at_size = target.sized(self.tree_size.num_nodes + 1)
        cycles = generate(at_size, self.proposer, [state], self.tree_size)
        seconds = sum(cycle.seconds for (cycle,) in cycles)
        if counted:
            self.seconds += seconds
            self.tokens += len(state.written)


def _predict(run: Simulated, costs: CycleCosts) -> Prediction:
    speed = run.tokens / costs.seconds(run)
    rows = float((run.rows * torch.arange(len(run.rows))).sum())
    nodes = rows / run.cycles - 1
    return Prediction(run.tree_size, run.tau, run.steps / run.cycles, nodes, speed, speed * costs.plain)
