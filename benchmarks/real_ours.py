"""Our side of real.py, and Hugging Face's: `python benchmarks/real_ours.py JOB ANSWERS`.

JOB is JSON: `model` (a Hugging Face directory), `dtype`, and either `disputed` (prompt, our plain text and
another one, as token ids) or `method` (hf_generate, hf_prompt_lookup, plain, ngram or what `coral.load` calls
a drafter), `prompts` (name: token ids), `tokens` (to write at most), `eos_ids` (which end a text), `tree` (as
`--tree`; null: the drafter's own). ANSWERS gets a JSON object a line: `versions` once all is loaded and warm,
then for each prompt what real_table.Text holds; or a `verdict` for each disputed text (bench/equality.py).
"""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import coral
from coral.bench.equality import compare, references
from coral.bench.methods import Write, Written, hugging_face, ours
from coral.decoding.sampling import Sampling
from coral.memory import keep_freed_memory
from coral.options import quiet_transformers, read_budget
from coral.target import Target


def main(job_path: str, answers_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    keep_freed_memory()
    quiet_transformers()
    found = verdicts(job) if "disputed" in job else texts(job)
    with Path(answers_path).open("w") as answers:
        for line in found:
            print(json.dumps(line), file=answers, flush=True)


def texts(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    write, tree = method(job)
    prompts, eos_ids = job["prompts"], frozenset(job["eos_ids"])
    write(next(iter(prompts.values())), Sampling(), 0, 16, eos_ids)  # warm up
    names = ("torch", "transformers")
    yield {"versions": {name: version(name) for name in names}, "tree": tree}
    for name, prompt in prompts.items():
        written = write(prompt, Sampling(), 0, job["tokens"], eos_ids)
        yield {"prompt": name, **counted(written, prefill_writes=not written.cycles)}


def method(job: dict[str, Any]) -> tuple[Write, str | None]:
    """The function that writes, and which tree it drafts."""
    name, model, dtype = job["method"], job["model"], job["dtype"]
    if name.startswith("hf_"):
        options = {"prompt_lookup_num_tokens": 10} if name == "hf_prompt_lookup" else {}
        return hugging_face(Target.load(model, dtype=dtype), **options), None
    drafter = None if name == "plain" else name
    pair = coral.load(model, drafter, dtype=dtype, budget=read_budget(job["tree"]))
    tree = None if drafter is None else f"{pair.budget}, {pair.budget_origin}"
    return ours(pair.target, pair.proposer, pair.budget), tree


def counted(written: Written, prefill_writes: bool) -> dict[str, Any]:
    """As in real_table.Text; Hugging Face's first forward writes a token, our prefill does not."""
    return {
        "tokens": written.tokens,
        "seconds": written.seconds,
        "decode_seconds": written.seconds - written.prefill_seconds,
        "decoded": len(written.tokens) - prefill_writes,
        "forwards": written.num_cycles - prefill_writes,
    }


def verdicts(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    target = Target.load(job["model"], dtype=job["dtype"])
    logits = references(target)
    for prompt, plain, other in job["disputed"]:
        yield {"verdict": compare(prompt, plain, other, Sampling(), 0, logits)}


if __name__ == "__main__":
    main(*sys.argv[1:])
