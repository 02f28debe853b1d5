"""Run every method over the same prompts, method after method on each prompt, and keep what is finished.

Each text goes to OUTPUT/records.jsonl as it is written; OUTPUT/results.json holds the rows that follow.
A bench that was stopped goes on where it was when it is started again with the same settings.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from coral.bench.assistant import load_assistant
from coral.bench.costs import measure, plain_variants
from coral.bench.deepen import deepen as deepen_
from coral.bench.deepen import plain_bytes
from coral.bench.environment import commit, environment
from coral.bench.equality import Logits, Verdict, compare, references
from coral.bench.log import Log
from coral.bench.methods import RESERVED, MakeProposer, Method, all_methods, maker
from coral.bench.recall import recall_by_depth
from coral.bench.results import Tree
from coral.bench.rows import KEY, Record, rows
from coral.data.chat_format import end_answers
from coral.decoding.cycle import Proposer
from coral.decoding.merged import Merged
from coral.decoding.sampling import Sampling
from coral.drafters.feature.network import num_bytes
from coral.drafters.feature.propose import Feature
from coral.errors import CoralError
from coral.files import atomic_text
from coral.locks import locks_output
from coral.progress import spinner
from coral.suites import prompts as suites_
from coral.target import default as models
from coral.target.target import Target
from coral.tree import DEFAULT, LOOKUP_NODES, Budget


@locks_output
def bench(
    target: Target | str | Path | None,
    drafters: Mapping[str, str | Path | MakeProposer],
    suites: str | Sequence[str],
    output: str | Path,
    *,
    limit: int | None = None,
    deepen: int | None = None,
    cost_ratio: float = 0.10,
    dtypes: Sequence[str] = ("auto",),
    temperatures: Sequence[float] = (0.0,),
    coupled: Sequence[bool] = (True,),
    max_new_tokens: int = 128,
    budget: Budget | None = None,
    peers: bool = True,
    assistant: str | Path | None = None,
    compile: bool = False,
    head: str = "auto",
    fallback: bool = False,
    ignore_eos: bool = False,
    seed: int = 0,
    device: str | None = None,
    note: str = "",
    command: str | None = None,
) -> Path:
    """Measure plain decoding, drafters and peers; returns OUTPUT/results.json.

    Every method writes a turn up to the target's end token, or `max_new_tokens` tokens. Wall time includes
    prefill. A second turn continues with the plain answer to the first, whatever the method.

    Args:
        target: loaded, what `coral.load` takes, or None for SmolLM2-135M-Instruct.
        drafters: name -> what `coral.load` takes as a drafter's name, or a function that makes the proposer.
        suites, limit: see `suites.load`.
        deepen: append layers that change no output up to this many (see `deepen.deepen`).
        dtypes: "auto", "float32", "bfloat16", "float16"; each is measured against its own plain decoding.
        assistant: a small causal LM of the target's vocabulary, with which Hugging Face's assisted generation
            becomes a peer.
        compile: plain decoding may also be compiled, and our own methods are (see `Target.compiled`).
        budget: of all drafters; None: what `coral tune` found for each, else the built-in one.
        head: the drafters' LM head, see `heads.load`.
        ignore_eos: end tokens do not end a turn, so that all are of one length. What a target writes behind
            its end is unlike its other text, and drafts of it are worse.
        fallback: our drafters take plain steps while drafting is slower (see `Fallback`), which changes tau.
        coupled: whether drafting shares the sampler's noise; each value gives a row at temperature > 0.
        note: printed with every table, for example that the target's weights are random.
        command: what to type to repeat it; None takes this process's command line.

    Raises:
        CoralError: a bad name or file, or an output that holds another bench or that another process writes.
    """
    from coral.api import located

    output = Path(output)
    prompts = suites_.load(suites, limit)
    if taken := sorted(name for name in RESERVED if drafters.get(name, name) != name):
        raise CoralError(f"drafter name {taken[0]!r} is reserved; rename it in --drafter NAME=DRAFTER.")
    drafters = {name: source for name, source in drafters.items() if name != "plain"}  # measured in any case
    if assistant is not None and not peers:
        raise CoralError(
            "an assistant makes a peer, but peers are left out; leave out one of the two options."
        )
    if max_new_tokens < 1:
        raise CoralError(f"max_new_tokens is {max_new_tokens}, but it must be at least 1.")
    settings = {
        "target": target.name if isinstance(target, Target) else str(target or models.SMOLLM2.name),
        "drafters": {k: str(v) if isinstance(v, (str, Path)) else "function" for k, v in drafters.items()},
        "suites": {suite: len(items) for suite, items in prompts.items()},
        "deepen": deepen,
        "cost_ratio": cost_ratio if deepen else None,
        "dtypes": list(dtypes),
        "temperatures": list(temperatures),
        "coupled": list(coupled),
        "max_new_tokens": max_new_tokens,
        "budget": None if budget is None else asdict(budget),
        "peers": peers,
        "assistant": None if assistant is None else str(assistant),
        "compile": compile,
        "head": head,
        "fallback": fallback,
        "ignore_eos": ignore_eos,
        "seed": seed,
        "note": note,
    }
    # Before minutes of loading and measuring, and once: what is measured is of one revision.
    drafters = {k: located(v, head) if isinstance(v, str) else v for k, v in drafters.items()}
    header = {"settings": settings, "commit": commit()}
    log = Log(output / "records.jsonl", header)
    results: dict[str, Any] = {
        "environment": environment(),
        "command": command or shlex.join(["coral", *sys.argv[1:]]),
        **header,
        "skipped": [],
        "routed_heads": {},
        "trees": {},
    }
    console = Console(stderr=True, soft_wrap=True)
    try:
        for dtype in dtypes:
            with spinner("Loading the target"):
                loaded = _load(target, dtype, device)
                end_answers(loaded)
            suites_.check(suites, loaded.vocab_size, loaded.tokenizer)
            helper = None if assistant is None else load_assistant(assistant, loaded)
            if deepen and loaded.blocks is not None:
                raise CoralError(
                    "appended layers have no packed blocks; leave out --deepen, or use dtype auto."
                )
            width = deepen_(loaded.model, deepen, cost_ratio) if deepen else None
            results["environment"] = environment(loaded.device)
            results["target"] = {
                "name": loaded.name,
                "revision": loaded.revision,
                "layers": loaded.config.num_hidden_layers,
                "appended_ffn_width": width,
            }
            dtype_, few = loaded.precision, _first_prompts(loaded, prompts)
            trees = log.trees.get(dtype_)  # a bench that goes on keeps its trees
            if trees is None:
                trees = _choose_trees(loaded, drafters, budget, head, compile)
            results["trees"][dtype_] = {
                k: {**tree, "budget": asdict(tree["budget"])} for k, tree in trees.items()
            }
            budgets = {name: tree["budget"] for name, tree in trees.items()}
            lookup = Budget(2, LOOKUP_NODES, max(LOOKUP_NODES, (budget or DEFAULT).num_nodes), min_gain=0.1)
            tree_rows = {lookup.num_nodes + 1, *(each.num_nodes + 1 for each in budgets.values())}
            targets = {"eager": loaded}
            if compile:
                sizes = {1, 2, *tree_rows}
                fast = loaded.compiled(tuple(sizes))
                targets["compiled" if fast.pads else "native"] = fast
                if fast.pads:
                    count = len(sizes)
                    console.print(f"{dtype}: compiling, a few seconds a layer for each of {count} forwards")
            fastest = [*targets.values()][-1]
            made = {name: maker(source, head) for name, source in drafters.items()}
            with console.status(f"{dtype_}: measuring what plain and draft steps cost ..."):
                results["routed_heads"][dtype_] = _measure_apart(
                    targets, made, few, log, max_new_tokens, budgets, max(tree_rows), helper
                )
            if dtype_ not in log.trees:
                log.add_trees(dtype_, trees)
            costs, tie_references = log.costs[dtype_], references(loaded)
            shown = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in costs.plain_seconds.items())
            console.print(f"{dtype_}: plain decoding is {costs.plain!r}, the fastest, per token: {shown}")
            plain = plain_variants(targets)[costs.plain]
            eos_ids = frozenset[int]() if ignore_eos else loaded.eos_ids
            for temperature in temperatures:
                sampling = Sampling(temperature=temperature, seed=seed)
                flags = list(coupled) if temperature else [False]  # at T = 0 there is no noise to share
                methods = all_methods(fastest, plain, made, flags, budgets, peers, lookup, helper, fallback)
                turns = sum(prompt.num_turns for items in prompts.values() for prompt in items)
                with Progress(console=console, transient=True) as progress:
                    task = progress.add_task("warming up", total=turns * len(methods))
                    for method in methods:
                        method.write(few[0][0], sampling, 0, 4)
                    progress.update(task, description=f"{dtype_} T={temperature:g}")
                    for suite, prompt in ((s, p) for s, items in prompts.items() for p in items):
                        common = (sampling, max_new_tokens, eos_ids, log, tie_references)
                        for reason in _conversation(loaded, methods, suite, prompt, *common):
                            progress.advance(task)
                            results["skipped"] += [reason] if reason else []
                _save(output, results, log)
    finally:  # Ctrl-C included: what is finished is kept
        _save(output, results, log)
    return output / "results.json"


def _save(output: Path, results: dict[str, Any], log: Log) -> None:
    if log.records:
        results["costs"] = {dtype: costs.to_json() for dtype, costs in log.costs.items()}
        results["rows"] = rows(log.records, log.costs)
        atomic_text(output / "results.json", json.dumps(results, indent=1) + "\n")


def _choose_trees(
    target: Target,
    drafters: Mapping[str, str | Path | MakeProposer],
    asked: Budget | None,
    head: str,
    compile: bool,
) -> dict[str, Tree]:
    """The budget of each drafter and where it comes from, as the log and the results hold it."""
    from coral.api import choose_budget

    trees: dict[str, Tree] = {}
    for name, source in drafters.items():
        named = source if isinstance(source, (str, Path)) else None  # a function has no directory
        budget, origin = choose_budget(target, named, asked, head, compile)
        trees[name] = {"budget": budget, "origin": origin}
    return trees


def _measure_apart(
    targets: Mapping[str, Target],
    made: Mapping[str, MakeProposer],
    prompts: Sequence[Sequence[list[int]]],
    log: Log,
    length: int,
    budgets: Mapping[str, Budget],
    most_rows: int,
    assistant: PreTrainedModel | None,
) -> dict[str, Any]:
    """What is measured on a few prompts of each suite before the texts: costs, unless the log holds them, and
    the recall of routed heads, by drafter.
    """
    target = [*targets.values()][-1]
    trained = {name: p for name, make in made.items() if (p := _trained(make(target, False)))}
    if target.precision not in log.costs:
        drafts = {name: num_bytes(p.drafter) + p.head.num_bytes for name, p in trained.items()}
        drafts |= {} if assistant is None else {"hf_assisted": plain_bytes(assistant)}
        log.add(measure(targets, drafts, [suite[0] for suite in prompts][:3], most_rows))
    texts = [prompt for suite in prompts for prompt in suite]
    recalls = {name: recall_by_depth(target, p, texts, length, budgets[name]) for name, p in trained.items()}
    return {name: recall for name, recall in recalls.items() if recall}


def _trained(proposer: Proposer) -> Feature | None:
    inner = proposer.drafter if isinstance(proposer, Merged) else proposer
    return inner if isinstance(inner, Feature) else None


def _load(target: Target | str | Path | None, dtype: str, device: str | None) -> Target:
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
    """The first few prompts of each suite that leave room to write: what is measured beside the rows."""
    room = target.context_length - 64
    rendered = ((suites_.render(target.tokenizer, p) for p in items) for items in prompts.values())
    fitting = [list(islice((ids for ids in suite if len(ids) <= room), count)) for suite in rendered]
    if not any(fitting):
        raise CoralError(f"no prompt fits the target's context of {target.context_length}; use other suites.")
    return [suite for suite in fitting if suite]


def _conversation(
    target: Target,
    methods: Sequence[Method],
    suite: str,
    prompt: suites_.Prompt,
    sampling: Sampling,
    length: int,
    eos_ids: frozenset[int],
    log: Log,
    references: tuple[Logits, Logits] | None,
) -> Iterator[str | None]:
    """Every turn by every method. Yields None after each text, or once why the rest is left out."""
    dtype = target.precision
    answers: list[str] = []
    for turn in range(prompt.num_turns):
        ids = suites_.render(target.tokenizer, prompt, answers)
        if len(ids) + length > target.context_length:
            yield f"{suite}/{prompt.id} turn {turn + 1}: {len(ids)} + {length} tokens exceed the context"
            return
        sequence_id = crc32(f"{suite}/{prompt.id}/{turn}".encode())
        plain: list[int] | None = None
        for method in methods:
            key = (dtype, sampling.temperature, method.coupled, method.name, suite, prompt.id, turn)
            record = log.find(key)
            if record is None:
                written = method.write(ids, sampling, sequence_id, length, eos_ids)
                verdict: Verdict | None = None
                # transformers draws other noise, and its weights are rounded where ours are packed.
                foreign = method.name.startswith("hf_")
                if not foreign or (sampling.temperature == 0 and target.blocks is None):
                    reference = written.tokens if plain is None else plain
                    verdict = compare(ids, reference, written.tokens, sampling, sequence_id, references)
                asked: dict[str, Any] = dict(zip(KEY, key, strict=True))
                record = Record(**asked, kind=method.kind, **vars(written), verdict=verdict)
                log.add(record)
            plain = record.tokens if plain is None else plain
            yield None
        assert plain is not None
        answers.append(suites_.answer(target.tokenizer, plain, target.eos_ids))
