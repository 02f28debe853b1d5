"""Throughput: tokens a second of many texts at once, plain and with each drafter, by the engine that serves.

All write the same prompts, in turn and in several rounds, with so many texts at once; a text that ends makes
room for the next. Ratios are medians of rounds. Every text is compared with the one that plain decoding
writes alone.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from rich.console import Console

from coral.bench.environment import commit, environment
from coral.bench.equality import references, verdict_of
from coral.bench.settings import BenchConfig
from coral.decoding.cycle import Proposer
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import Cycle, State
from coral.drafters.drafting import Drafting
from coral.errors import CoralError
from coral.files import atomic_text
from coral.serving.engine import Engine
from coral.suites import prompts as suites_
from coral.target.target import Target
from coral.tree import TreeSize

ROUNDS = 3


@dataclass(frozen=True)
class Way:
    """A way of writing: plain decoding, or a drafter."""

    name: str
    proposer: Proposer
    tree_size: TreeSize


@dataclass
class Round:
    """All prompts written once. seconds: of the cycles; all_seconds: with the reading of prompts."""

    texts: list[list[int]]
    seconds: float = 0.0
    all_seconds: float = 0.0
    cycles: list[Cycle] = field(default_factory=list)
    padded_rows: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))

    @property
    def tau(self) -> float:
        return sum(len(cycle.tokens) for cycle in self.cycles) / len(self.cycles)


@dataclass(frozen=True)
class Row:
    """What one way gave with so many texts at once.

    speed: tokens a second, without prompts. ratios: over plain decoding of as many, by round; with_prompts:
    the same with the time that reading them took. verdicts: how many texts are equal, near ties, or wrong.
    """

    name: str
    at_once: int
    speed: float
    ratios: list[float]
    with_prompts: float
    tau: float
    nodes: float
    padded_rows: int
    verdicts: dict[str, int]


def bench_batched(
    target: Target,
    drafters: Mapping[str, Drafting],
    suites: str | Sequence[str],
    batches: Sequence[int],
    output: str | Path,
    config: BenchConfig,
) -> Path:
    """Measure all batches with the first temperature of `config`; returns OUTPUT/results.json.

    Raises:
        CoralError: no prompts, no batch, or the disk refuses.
    """
    if not batches or min(batches) < 1:
        raise CoralError("a batch must have at least one text; name sizes as in --batch 1,2,4,8.")
    output, target = Path(output), target.on(config.backend)
    prompts = _prompts(target, suites, config, max(batches))
    sampling = Sampling(config.temperatures[0], seed=config.seed)
    ways = [Way("plain", Plain(), TreeSize(1, 0, 1))]
    for name, drafting in drafters.items():
        drafting = replace(drafting, fallback=True)
        ways.append(Way(name, drafting.proposer(target), drafting.tree_size(target)[0]))
    results: dict[str, Any] = {
        "environment": environment(target.device), "commit": commit(),
        "command": shlex.join(["coral", *sys.argv[1:]]), "note": config.note, "target": target.name,
        "precision": target.precision, "backend": target.backend, "temperature": sampling.temperature,
        "prompts": len(prompts), "max_new_tokens": config.max_new_tokens,
        "tree_sizes": {way.name: str(way.tree_size) for way in ways[1:]}, "rows": [],
    }  # fmt: skip
    for rows in _measure(target, ways, prompts, sampling, batches, config):
        results["rows"] += map(asdict, rows)
        atomic_text(output / "results.json", json.dumps(results, indent=1) + "\n")
        atomic_text(output / "results.md", markdown(results))
    return output / "results.json"


def _prompts(target: Target, suites: str | Sequence[str], config: BenchConfig, most: int) -> list[list[int]]:
    """First turns, of all suites in turn: `config.limit` of each, or as many as the largest batch has."""
    loaded = suites_.load(suites, config.limit).values()
    in_turn = [prompt for some in zip_longest(*loaded) for prompt in some if prompt is not None]
    ids = [suites_.render(target.tokenizer, prompt) for prompt in in_turn]
    fitting = [each for each in ids if len(each) + config.max_new_tokens <= target.context_length]
    if not fitting:
        raise CoralError(f"no prompt fits the target's context of {target.context_length}; use other suites.")
    return fitting if config.limit is not None else fitting[:most]


def _measure(
    target: Target,
    ways: Sequence[Way],
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batches: Sequence[int],
    config: BenchConfig,
) -> Iterator[list[Row]]:
    """The rows of each batch."""
    console = Console(stderr=True)

    def write(way: Way, at_once: int) -> Round:
        return _write(target, way, [begin(i) for i in range(len(prompts))], at_once)

    def begin(i: int) -> State:
        eos_ids = frozenset[int]() if config.ignore_eos else target.eos_ids
        most = max(way.tree_size.num_nodes for way in ways)
        options = {"sampling": sampling, "sequence_id": i, "eos_ids": eos_ids}
        return State.begin(target, prompts[i], config.max_new_tokens, most, **options)

    with console.status("writing each text alone ..."):
        alone = write(ways[0], 1).texts
        for way in ways[1:]:  # what rows cost is measured before the clock runs
            _write(target, way, [begin(i) for i in range(min(2, len(prompts)))], 2)
    judge = references(target)
    for at_once in batches:
        with console.status(f"{at_once} at once ..."):
            rounds = [[write(way, at_once) for way in ways] for _ in range(ROUNDS)]
        rows = []
        for i, way in enumerate(ways):
            ratios = [each[0].seconds / each[i].seconds for each in rounds]
            own = [each[i] for each in rounds]
            verdicts = Counter[str](
                verdict_of(prompt, plain, text, sampling, number, judge)
                for each in own
                for number, (prompt, plain, text) in enumerate(zip(prompts, alone, each.texts, strict=True))
            )
            cycles = [cycle for each in own for cycle in each.cycles]
            rows.append(
                Row(
                    way.name, at_once, median(each.tokens / each.seconds for each in own), ratios,
                    median(each[0].all_seconds / each[i].all_seconds for each in rounds),
                    median(each.tau for each in own),
                    sum(cycle.num_drafted for cycle in cycles) / len(cycles),
                    sum(each.padded_rows for each in own), dict(verdicts),
                )
            )  # fmt: skip
        yield rows


def _write(target: Target, way: Way, states: Sequence[State], at_once: int) -> Round:
    """Write texts to their ends, so many at once; nothing is kept of one for another."""
    engine = Engine(target, way.proposer, way.tree_size, at_once, kept=0)
    for state in states:
        engine.submit(state)
    written, begin = Round([]), perf_counter()
    while engine.waiting + engine.running:
        if events := engine.step():
            written.cycles += [cycle for _, cycle in events]
            written.seconds += events[0][1].seconds  # all of them share it
    written.all_seconds = perf_counter() - begin
    written.texts, written.padded_rows = [state.written for state in states], engine.padded_rows
    return written


def markdown(results: Mapping[str, Any]) -> str:
    """A table with a line a batch, and under it what was measured, where and how."""
    names = [*dict.fromkeys(row["name"] for row in results["rows"])]
    drafters = names[1:]
    head = [f"{name}, tokens/s | over plain | with prompts | tau | nodes" for name in drafters]
    lines = [
        f"# Texts at once: {results['target']}, {results['precision']}, {results['backend']}, "
        f"T = {results['temperature']:g}\n",
        f"| texts at once | {' | '.join(['plain, tokens/s', *head, 'padded rows', 'texts'])} |",
        f"|{'---|' * (4 + 5 * len(drafters))}",
    ]
    by_batch: dict[int, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        by_batch.setdefault(row["at_once"], []).append(row)
    for at_once, (plain, *rows) in by_batch.items():
        cells = [str(at_once), f"{plain['speed']:.1f}"]
        for row in rows:
            ratios = sorted(row["ratios"])
            cells += [
                f"{row['speed']:.1f}", f"{median(ratios):.2f}x ({ratios[0]:.2f}-{ratios[-1]:.2f})",
                f"{row['with_prompts']:.2f}x", f"{row['tau']:.2f}", f"{row['nodes']:.1f}",
            ]  # fmt: skip
        verdicts = sum((Counter(row["verdicts"]) for row in (plain, *rows)), Counter[str]())
        cells += [str(sum(row["padded_rows"] for row in (plain, *rows)))]
        cells += [", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))]
        lines.append(f"| {' | '.join(cells)} |")
    machine = results["environment"]
    trees = ", ".join(f"{name} {size}" for name, size in results["tree_sizes"].items())
    lines += [
        "",
        f"{results['prompts']} prompts, {results['max_new_tokens']} tokens each at most, {ROUNDS} rounds of "
        "all in turn; tokens a second are without the reading of prompts. over plain: the median of the "
        f"rounds' ratios, and the least and the most. Largest trees: {trees or 'none'}.",
        "",
        f"`{results['command']}`, commit {results['commit']}, {machine['hardware']}, {machine['threads']} "
        f"threads. {results['note']}".rstrip(),
        "",
    ]
    return "\n".join(lines)
