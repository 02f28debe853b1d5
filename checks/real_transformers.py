"""Hugging Face's side of benchmarks/real.py: `python real_transformers.py JOB ANSWERS`. It needs no coral.

JOB is JSON: `model` (a Hugging Face directory), `dtype`, `prompts` (name: token ids), `tokens` (to write at
most), `eos_ids` (which end a text), `options` (more of `generate`). ANSWERS gets a JSON object a line:
`versions` once the model is loaded and warm, then for each prompt what real_table.Text holds.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig


def main(job_path: str, answers_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    model.generation_config = (
        GenerationConfig()
    )  # what the job leaves open is not for the model's own to fill
    ends: list[float] = []
    model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))

    def write(prompt: list[int], length: int) -> dict[str, Any]:
        config = GenerationConfig(
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=job["eos_ids"],
            pad_token_id=job["eos_ids"][0],
            **job["options"],
        )
        ends.clear()
        begin = time.perf_counter()
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        tokens = output[0, len(prompt) :].tolist()
        end = time.perf_counter()
        return {
            "tokens": tokens,
            "seconds": end - begin,
            "decode_seconds": end - ends[0],  # the first token comes out of the first forward
            "decoded": len(tokens) - 1,
            "forwards": len(ends) - 1,
        }

    prompts = job["prompts"]
    write(next(iter(prompts.values())), 16)  # warm up
    with Path(answers_path).open("w") as answers:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({"versions": versions}), file=answers, flush=True)
        for name, prompt in prompts.items():
            print(json.dumps({"prompt": name, **write(prompt, job["tokens"])}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
