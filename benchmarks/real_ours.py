"""Our side of real.py: `python benchmarks/real_ours.py JOB ANSWERS`.

JOB is JSON: `model` (a Hugging Face directory), `dtype`, and either `disputed` (prompt, our plain text and
another one, as token ids) or `drafter` (as `coral.load` calls it; null: plain steps), `tree` (as `--tree`;
null: the drafter's own), `prompts` (name: token ids), `tokens` (to write at most), `eos_ids` (end a text).
ANSWERS gets a JSON object a line: `versions` once all is loaded and warm, then for each prompt what
real_table.Text holds; or a `verdict` for each disputed text (bench/equality.py).
"""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import coral
from coral.bench.equality import references, verdict_of
from coral.bench.methods import ours
from coral.cli.options import quiet_transformers, read_tree_size
from coral.decoding.sampling import Sampling
from coral.native.memory import keep_freed_memory
from coral.target.target import Target


def main(job_path: str, answers_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    keep_freed_memory()
    quiet_transformers()
    found = verdicts(job) if "disputed" in job else texts(job)
    with Path(answers_path).open("w") as answers:
        for line in found:
            print(json.dumps(line), file=answers, flush=True)


def texts(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    pair = coral.load(job["model"], job["drafter"], dtype=job["dtype"], tree=read_tree_size(job["tree"]))
    write = ours(pair.target, pair.proposer, pair.tree_size)
    prompts, eos_ids = job["prompts"], frozenset(job["eos_ids"])
    write(next(iter(prompts.values())), Sampling(), 0, 16, eos_ids)  # warm up
    tree = f"{pair.tree_size} ({pair.tree_size_origin})" if job["drafter"] else None
    yield {"versions": {name: version(name) for name in ("torch", "transformers")}, "tree": tree}
    for name, prompt in prompts.items():
        written = write(prompt, Sampling(), 0, job["tokens"], eos_ids)
        yield {
            "prompt": name,
            "tokens": written.tokens,
            "seconds": written.seconds,
            "decode_seconds": written.seconds - written.prefill_seconds,
            "decoded": len(written.tokens),  # our prefill leaves out the last row, so no token comes from it
            "forwards": written.num_cycles,
        }


def verdicts(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    target = Target.load(job["model"], dtype=job["dtype"])
    logits = references(target)
    for prompt, plain, other in job["disputed"]:
        yield {"verdict": verdict_of(prompt, plain, other, Sampling(), 0, logits)}


if __name__ == "__main__":
    main(*sys.argv[1:])
