"""Is a drafter in llama.cpp what it is here? `make test-llama` runs this; docs/llama.cpp.md explains it.

Without --target a tiny random Llama and a drafter that knows its texts by heart are written by both, greedily
in float32: texts and counts must be the same, and the drafter with a planted fault must fail. With --target
and --drafter, 24 prompts of the three suites: texts, tau and acceptance by position may differ by as much as
`agreement.py` allows. Ends with 1 if they differ by more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import overfitted
import torch
from agreement import Counts, judge
from chains import chain, shortened
from requant import requant
from vllm_check import first_prompts

from coral.bench.equality import references, verdict_of
from coral.cli.options import quiet_transformers
from coral.decoding.sampling import Sampling
from coral.drafters.drafting import Drafting
from coral.export import llama_cpp, llama_cpp_target
from coral.target.gguf.config import end_ids
from coral.target.gguf.file import read
from coral.target.gguf.rope import LLAMA3
from coral.target.target import Target

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", type=Path, required=True, help="the Python of llama.cpp's environment")
    parser.add_argument("--target", type=Path, help="a GGUF file; its weights are run in float32")
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--dtype", default="f32", help="of the exported drafter, with --drafter")
    parser.add_argument("--prompts", type=int, default=8, help="of each suite")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="texts that llama.cpp writes together")
    options = parser.parse_args()
    quiet_transformers()
    with tempfile.TemporaryDirectory() as scratch:
        check = tiny if options.target is None else real
        return int(not check(options, Path(scratch)))


def tiny(options: argparse.Namespace, scratch: Path) -> bool:
    """Whether the tiny pair is the same in both, and each planted fault is found."""
    begin = perf_counter()
    pair = overfitted.make(scratch)
    print(f"a drafter has learnt {len(pair.prompts)} texts by heart in {perf_counter() - begin:.0f} s")
    with torch.inference_mode():
        ours = write_ours(pair.target, pair.drafter, pair.gguf, pair.prompts, overfitted.LENGTH, options)
    held = []
    for name, fault in {"as exported": nullcontext, "the same, all at once": nullcontext, **FAULTS}.items():
        at_once = len(pair.prompts) if name == "the same, all at once" else 1
        job = {"prompts": pair.prompts, "length": overfitted.LENGTH, "at_once": at_once}
        with fault():
            theirs = write_theirs(options, scratch, pair.gguf, pair.drafter, job)
        held.append((ours == theirs) == (name not in FAULTS))
        equal = sum(a == b for a, b in zip(ours.texts, theirs.texts, strict=True))
        outcome = "passed" if held[-1] else "FAILED"
        print(
            f"{outcome}: {name}: {equal} of {len(ours.texts)} texts equal, drafted "
            f"{theirs.drafted} ({ours.drafted} here), accepted {theirs.accepted} ({ours.accepted} here), by "
            f"position {theirs.counts.accepted_by_position} ({ours.counts.accepted_by_position} here)",
            flush=True,
        )
    return all(held)


def real(options: argparse.Namespace, scratch: Path) -> bool:
    """Whether 24 prompts come out alike with a target's weights, dequantised to float32."""
    exact = scratch / "target.gguf"
    requant(options.target, exact, "F32")
    target = Target.load(options.target, dtype="float32")
    prompts = first_prompts(target, options.prompts, options.tokens + options.draft_tokens + 1)
    begin = perf_counter()
    ours = write_ours(target, options.drafter, exact, prompts, options.tokens, options)
    print(f"ours: {perf_counter() - begin:.0f} s", flush=True)
    job = {"prompts": prompts, "length": options.tokens, "at_once": options.at_once}
    theirs = write_theirs(options, scratch, exact, options.drafter, job)
    verdicts = [
        verdict_of(prompt, text, other, Sampling(), 0, references(target, torch.float64))
        for prompt, text, other in zip(prompts, ours.texts, theirs.texts, strict=True)
    ]
    found, failed = judge(verdicts, ours.counts, theirs.counts)
    outcome = f"FAILED ({', '.join(failed)})" if failed else "passed"
    print(f"{outcome}: llama.cpp {theirs.version}: {found}")
    for side, written in (("ours", ours), ("llama.cpp", theirs)):
        shares = ", ".join(f"{100 * share:.1f}%" for share in written.counts.by_position)
        print(f"{side}: {written.counts.cycles} cycles, tau {written.counts.tau:.3f}, by position {shares}")
    return not failed


@dataclass(frozen=True)
class Written:
    """texts: without the token that ended one. drafted, accepted: draft tokens of each text."""

    texts: list[list[int]]
    drafted: list[int]
    accepted: list[int]
    counts: Counts
    version: str = ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Written):
            return NotImplemented
        mine, theirs = ((w.texts, w.drafted, w.accepted, w.counts) for w in (self, other))
        return mine == theirs


def write_ours(
    target: Target, drafter: Path, gguf: Path, prompts: Sequence[list[int]], length: int, options: Any
) -> Written:
    """Our chains, with the counts that llama.cpp has for such."""
    proposer = Drafting(drafter, fallback=False).proposer(target)
    ends = end_ids(read([gguf]))
    texts, cycles = [], []
    for prompt in prompts:
        text, accepted = chain(target, proposer, prompt, length, options.draft_tokens, ends)
        texts.append([token for token in text if token not in ends])
        cycles.append(shortened(accepted, len(text), length, options.draft_tokens))
    counts = Counts.of((a for text in cycles for _, a in text), options.draft_tokens)
    drafted = [sum(d for d, _ in text) for text in cycles]
    return Written(texts, drafted, [sum(a for _, a in text) for text in cycles], counts)


def write_theirs(
    options: argparse.Namespace,
    scratch: Path,
    target: Path,
    drafter: Path,
    job: dict[str, Any],
) -> Written:
    """What llama_cpp_side.py answers with the drafter as we export it now; its log is shown if it fails."""
    file, dtype = scratch / "drafter.gguf", "f32" if options.target is None else options.dtype
    llama_cpp.export(drafter, file, llama_cpp_target.find(str(target)), dtype)
    job = {
        **job,
        "target": str(target),
        "drafter": str(file),
        "draft_tokens": options.draft_tokens,
        "threads": options.threads,
        "exact": True,
    }
    question, answer = scratch / "job.json", scratch / "answer.json"
    question.write_text(json.dumps(job))
    ended = subprocess.run(
        [options.engine, HERE / "llama_cpp_side.py", question, answer],
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode or not answer.exists():
        print(ended.stdout[-8000:], file=sys.stderr)
        raise SystemExit(f"llama.cpp ended with {ended.returncode} before it had answered.")
    found = json.loads(answer.read_text())
    answer.unlink()
    ends = end_ids(read([target]))
    texts = [[token for token in text if token not in ends] for text in found["texts"]]
    counts = Counts(found["cycles"], found["accepted_by_position"])
    return Written(texts, found["drafted"], found["accepted"], counts, found["version"])


def as_offsets() -> AbstractContextManager[Any]:
    """`d2t` as the EAGLE-3 directory has it."""
    right = llama_cpp.tensors

    def wrong(drafter: Any) -> dict[str, Any]:
        found = right(drafter)
        return found | {"d2t": found["d2t"] - np.arange(len(found["d2t"]))}

    return patch.object(llama_cpp, "tensors", wrong)


def without_scaling() -> AbstractContextManager[Any]:
    """The rotary embedding of a target that is not stretched."""
    right = llama_cpp.tensors

    def wrong(drafter: Any) -> dict[str, Any]:
        return {name: values for name, values in right(drafter).items() if name != LLAMA3}

    return patch.object(llama_cpp, "tensors", wrong)


def layers_off_by_one() -> AbstractContextManager[Any]:
    """The layers by what leaves them, as SGLang counts."""
    right = llama_cpp.metadata

    def wrong(*given: Any) -> dict[str, Any]:
        found, key = right(*given), f"{llama_cpp.ARCHITECTURE}.target_layers"
        return found | {key: [layer - 1 for layer in found[key]]}

    return patch.object(llama_cpp, "metadata", wrong)


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "query and key in Hugging Face's order": lambda: patch.object(
        llama_cpp, "interleaved", lambda rows, heads: rows
    ),
    "d2t as offsets": as_offsets,
    "layers off by one": layers_off_by_one,
    "no scaling of the rotary embedding": without_scaling,
}
"""Each makes an export wrong in a way of which llama.cpp says nothing."""


if __name__ == "__main__":
    sys.exit(main())
