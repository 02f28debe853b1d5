"""Run every method over the same prompts, method after method on each prompt, and keep what is finished.

Each text goes to OUTPUT/records.jsonl as it is written; OUTPUT/results.json holds the rows that follow.
A bench that was stopped goes on where it was when it is started again with the same settings.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from coral.bench.costs import measure, plain_variants
from coral.bench.deepen import append_layers, plain_bytes
from coral.bench.environment import commit, environment
from coral.bench.equality import references
from coral.bench.formulas import results_of
from coral.bench.gate import gates_of
from coral.bench.log import Log
from coral.bench.methods import RESERVED, MakeProposer, Rivals, all_methods, load_assistant, maker
from coral.bench.recall import recall_by_depth
from coral.bench.results import Tree
from coral.bench.settings import BenchConfig
from coral.bench.texts import Writing
from coral.data.chat_format import end_answers
from coral.decoding.cycle import Proposer
from coral.decoding.merged import Merged
from coral.decoding.sampling import Sampling
from coral.drafters.drafting import Drafting
from coral.drafters.kinds import DraftsByHead, ReadsWeights
from coral.errors import CoralError
from coral.files import atomic_text
from coral.locks import locks_output
from coral.progress import spinner
from coral.suites import prompts as suites_
from coral.target import default as models
from coral.target.target import Target
from coral.tree import DEFAULT, LOOKUP_NODES, TreeSize

Drafters = Mapping[str, str | Path | Drafting | MakeProposer]


@locks_output
def bench(
    target: Target | str | Path | None,
    drafters: Drafters,
    suites: str | Sequence[str],
    output: str | Path,
    config: BenchConfig | None = None,
    *,
    command: str | None = None,
) -> Path:
    """Measure plain decoding, drafters and peers; returns OUTPUT/results.json.

    Every method writes a turn up to the target's end token, or `max_new_tokens` tokens. Wall time includes
    prefill. A second turn continues with the plain answer to the first, whatever the method.

    Args:
        target: loaded, what `coral.load` takes, or None for SmolLM2-135M-Instruct.
        drafters: name -> what `coral.load` takes as a drafter's name, or a function that makes the proposer.
        suites: see `suites.load`.
        command: what to type to repeat it; None takes this process's command line.

    Raises:
        CoralError: a bad name or file, or an output that holds another bench or that another process writes.
    """
    output, config = Path(output), config or BenchConfig()
    prompts = suites_.load(suites, config.limit)
    if taken := sorted(name for name in RESERVED if drafters.get(name, name) != name):
        raise CoralError(f"drafter name {taken[0]!r} is reserved; rename it in --drafter NAME=DRAFTER.")
    drafters = {name: source for name, source in drafters.items() if name != "plain"}  # measured in any case
    settings = {
        "target": target.name if isinstance(target, Target) else str(target or models.SMOLLM2.name),
        "drafters": {k: "function" if callable(v) else str(v) for k, v in drafters.items()},
        "suites": {suite: len(items) for suite, items in prompts.items()},
        **asdict(config),
    }
    # Before minutes of loading and measuring, and once: what is measured is of one revision.
    options = {"head": config.head, "tree": config.tree_size}
    read = {k: v if callable(v) else Drafting.parse(v, **options).located() for k, v in drafters.items()}
    run = _Bench(target, read, suites, prompts, config, output, settings)
    run.results["command"] = command or shlex.join(["coral", *sys.argv[1:]])
    try:
        for dtype in config.dtypes:
            run.measure(dtype)
            run.save()
    finally:  # Ctrl-C included: what is finished is kept
        run.save()
    return output / "results.json"


@dataclass(frozen=True)
class _Loaded:
    """A target in one dtype, and what is measured with it.

    targets: the target by how it runs, "eager" and perhaps "compiled" or "native", the fastest last.
    few: the first prompts of each suite, as ids.
    rivals: who writes beside plain decoding.
    """

    targets: Mapping[str, Target]
    few: list[list[list[int]]]
    rivals: Rivals
    trees: dict[str, Tree]

    @property
    def eager(self) -> Target:
        return self.targets["eager"]

    @property
    def fastest(self) -> Target:
        return [*self.targets.values()][-1]


@dataclass
class _Bench:
    """One bench: what is asked, the log of what is finished, and the results that follow."""

    target: Target | str | Path | None
    drafters: Mapping[str, Drafting | MakeProposer]
    suites: str | Sequence[str]
    prompts: Mapping[str, Sequence[suites_.Prompt]]
    config: BenchConfig
    output: Path
    settings: dict[str, Any]
    log: Log = field(init=False)
    results: dict[str, Any] = field(init=False)
    console: Console = field(default_factory=lambda: Console(stderr=True, soft_wrap=True))

    def __post_init__(self) -> None:
        header = {"settings": self.settings, "commit": commit()}
        self.log = Log(self.output / "records.jsonl", header)
        parts: dict[str, Any] = {"skipped": [], "routed_heads": {}, "trees": {}, "gates": []}
        self.results = {"environment": environment(), "command": "", **header, **parts}

    def measure(self, dtype: str) -> None:
        """All of one dtype: load, measure costs, write."""
        loaded = self._load(dtype)
        precision = loaded.eager.precision
        trees = {
            name: {**tree, "tree_size": asdict(tree["tree_size"])} for name, tree in loaded.trees.items()
        }
        self.results["trees"][precision] = trees
        with self.console.status(f"{precision}: measuring what plain and draft steps cost ..."):
            self.results["routed_heads"][precision] = self._measure_apart(loaded)
        if precision not in self.log.trees:
            self.log.add_trees(precision, loaded.trees)
        costs = self.log.costs[precision]
        shown = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in costs.plain_seconds.items())
        self.console.print(f"{precision}: plain decoding is {costs.plain!r}, the fastest, per token: {shown}")
        for temperature in self.config.temperatures:
            self._write(loaded, Sampling(temperature=temperature, seed=self.config.seed))
        self.results["gates"] = gates_of(
            self.log.records,
            lambda ids: suites_.answer(loaded.eager.tokenizer, ids, loaded.eager.eos_ids),
        )

    def save(self) -> None:
        """Write results.json, once there is a record."""
        if self.log.records:
            self.results["costs"] = {dtype: costs.to_json() for dtype, costs in self.log.costs.items()}
            self.results["rows"] = results_of(self.log.records, self.log.costs)
            atomic_text(self.output / "results.json", json.dumps(self.results, indent=1) + "\n")

    def _load(self, dtype: str) -> _Loaded:
        config = self.config
        with spinner("Loading the target"):
            eager = load_target(self.target, dtype, config.device)
            end_answers(eager)
        suites_.check(self.suites, eager.vocab_size, eager.tokenizer)
        assistant = None if config.assistant is None else load_assistant(config.assistant, eager)
        width = append_layers(eager, config.deepen, config.cost_ratio)
        self.results["environment"] = environment(eager.device)
        self.results["target"] = {
            "name": eager.name,
            "revision": eager.revision,
            "layers": eager.config.num_hidden_layers,
            "appended_ffn_width": width,
        }
        few = _first_prompts(eager, self.prompts)
        # A bench that goes on keeps its trees.
        fast = eager.on(config.backend)
        trees = self.log.trees.get(eager.precision) or self._choose_trees(fast)
        rivals = Rivals(
            {name: maker(source) for name, source in self.drafters.items()},
            {name: tree["tree_size"] for name, tree in trees.items()},
            TreeSize(
                2, LOOKUP_NODES, max(LOOKUP_NODES, (config.tree_size or DEFAULT).num_nodes), min_gain=0.1
            ),
            assistant,
        )
        return _Loaded(self._ways(eager, fast, rivals, dtype), few, rivals, trees)

    def _choose_trees(self, target: Target) -> dict[str, Tree]:
        """The tree size of each drafter and where it comes from, as the log and the results hold it."""
        trees: dict[str, Tree] = {}
        for name, source in self.drafters.items():
            # A function has no directory.
            drafting = source if isinstance(source, Drafting) else Drafting(tree=self.config.tree_size)
            tree_size, origin = drafting.tree_size(target)
            trees[name] = {"tree_size": tree_size, "origin": origin}
        return trees

    def _ways(self, eager: Target, fast: Target, rivals: Rivals, dtype: str) -> dict[str, Target]:
        """The target by how it runs: eager, and where it is not the same native or recorded."""
        if fast.backend == "transformers":
            return {"eager": eager}
        if fast.backend == "native":
            return {"eager": eager, "native": fast}
        sizes = tuple({1, 2, *rivals.rows})
        self.console.print(f"{dtype}: compiling {len(sizes)} forwards")
        return {"eager": eager, "compiled": fast.on("graphs", sizes)}

    def _measure_apart(self, loaded: _Loaded) -> dict[str, Any]:
        """Measure on a few prompts of each suite, before the texts: costs, unless the log holds them, and the
        recall of routed heads, which is returned by drafter.
        """
        target, rivals = loaded.fastest, loaded.rivals
        made = {name: _without_lookup(make(target, False)) for name, make in rivals.made.items()}
        if target.precision not in self.log.costs:
            drafts = {name: p.num_bytes for name, p in made.items() if isinstance(p, ReadsWeights)}
            drafts |= {} if rivals.assistant is None else {"hf_assisted": plain_bytes(rivals.assistant)}
            first = [suite[0] for suite in loaded.few][:3]
            self.log.add(measure(loaded.targets, drafts, first, max(rivals.rows)))
        texts, length = [prompt for suite in loaded.few for prompt in suite], self.config.max_new_tokens
        recalls = {
            name: recall_by_depth(target, p, texts, length, rivals.tree_sizes[name])
            for name, p in made.items()
            if isinstance(p, DraftsByHead)
        }
        return {name: recall for name, recall in recalls.items() if recall}

    def _write(self, loaded: _Loaded, sampling: Sampling) -> None:
        """Every prompt by every method at one temperature."""
        config, target = self.config, loaded.eager
        plain = plain_variants(loaded.targets)[self.log.costs[target.precision].plain]
        flags = config.coupled if sampling.temperature else (False,)  # at T = 0 there is no noise to share
        methods = all_methods(loaded.fastest, plain, loaded.rivals, flags, config.peers, config.fallback)
        eos_ids = frozenset[int]() if config.ignore_eos else target.eos_ids
        writing = Writing(
            target, methods, sampling, config.max_new_tokens, eos_ids, references(target), self.log
        )
        turns = sum(prompt.num_turns for items in self.prompts.values() for prompt in items)
        with Progress(console=self.console, transient=True) as progress:
            task = progress.add_task("warming up", total=turns * len(methods))
            for method in methods:
                method.write(loaded.few[0][0], sampling, 0, 4)
            progress.update(task, description=f"{target.precision} T={sampling.temperature:g}")
            for suite, prompt in ((s, p) for s, items in self.prompts.items() for p in items):
                for reason in writing.conversation(suite, prompt):
                    progress.advance(task)
                    self.results["skipped"] += [reason] if reason else []


def _without_lookup(proposer: Proposer) -> Proposer:
    return proposer.drafter if isinstance(proposer, Merged) else proposer


def load_target(target: Target | str | Path | None, dtype: str, device: str | None) -> Target:
    """The target in this dtype; a given Target is copied, as deepening and casting would change it."""
    if target is None:
        return models.load(dtype=dtype, device=device)
    if not isinstance(target, Target):
        return Target.load(target, dtype=dtype, device=device)
    model = copy.deepcopy(target.model)
    if dtype != "auto":
        model = model.to(getattr(torch, dtype))
    return Target(model, target.tokenizer, name=target.name, revision=target.revision)


def _first_prompts(
    target: Target, prompts: Mapping[str, Sequence[suites_.Prompt]], count: int = 4
) -> list[list[list[int]]]:
    """The first few prompts of each suite that leave room to write. Costs and recall are measured on them."""
    room = target.context_length - 64
    rendered = ((suites_.render(target.tokenizer, p) for p in items) for items in prompts.values())
    fitting = [list(islice((ids for ids in suite if len(ids) <= room), count)) for suite in rendered]
    if not any(fitting):
        raise CoralError(f"no prompt fits the target's context of {target.context_length}; use other suites.")
    return [suite for suite in fitting if suite]
