"""llama.cpp's side of benchmarks/real.py, run by the Python of an environment with xllamacpp:
`python real_llama.py JOB ANSWERS`.

JOB is JSON: `model` (a GGUF file), `prompts` (name: token ids), `tokens` (to write at most), `threads`,
`speculative` (an n-gram method as `--spec-type` of llama-server names it, or null), `sizes` (of its n-gram
and its draft; null: llama.cpp's own). ANSWERS gets a JSON object a line: `versions` once the model is loaded
and warm, then for each prompt what real_table.Text holds. The server of the package runs in this process
and is asked for one text at a time.
"""

import json
import sys
import time
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp


def main(job_path: str, answers_path: str) -> None:
    with open(job_path, encoding="utf-8") as file:  # noqa: PTH123
        job = json.load(file)
    server = xllamacpp.Server(settings(job))

    def write(prompt: list[int], length: int) -> dict[str, Any]:
        asked = {
            "prompt": prompt,
            "n_predict": length,
            "temperature": 0.0,
            "top_k": 1,
            "cache_prompt": False,  # every prompt pays for its own prefill
            "return_tokens": True,
        }
        body = json.dumps(asked).encode()
        request = Request(
            f"{server.listening_address}/completion", body, {"Content-Type": "application/json"}
        )
        begin = time.perf_counter()
        with urlopen(request) as response:
            return json.load(response) | {"seconds": time.perf_counter() - begin}

    prompts = job["prompts"]
    write(next(iter(prompts.values())), 16)  # warm up
    with open(answers_path, "w", encoding="utf-8") as answers:  # noqa: PTH123
        say(answers, {"versions": {"xllamacpp": xllamacpp.__version__}})
        for name, prompt in prompts.items():
            answer = write(prompt, job["tokens"])
            timings, decoded = answer["timings"], len(answer["tokens"]) - 1
            text = {
                "tokens": answer["tokens"],
                "seconds": answer["seconds"],
                # The first token comes out of the prefill, from whose end llama.cpp counts these.
                "decode_seconds": timings["predicted_ms"] / 1000,
                "decoded": decoded,
                "forwards": decoded - timings.get("draft_n_accepted", 0),
            }
            say(answers, {"prompt": name, **text})


def settings(job: dict[str, Any]) -> Any:
    """llama-server's own defaults, but for the threads, one slot and the n-gram method."""
    found = xllamacpp.CommonParams()
    found.model.path = job["model"]
    found.n_ctx = max(map(len, job["prompts"].values())) + job["tokens"] + 64
    found.n_parallel, found.port, found.verbosity, found.warmup = 1, 0, 1, True
    found.cpuparams.n_threads = found.cpuparams_batch.n_threads = job["threads"]
    if job["speculative"]:
        word = job["speculative"].replace("-", "_")
        kinds = xllamacpp.common_speculative_type
        found.speculative.types = [getattr(kinds, f"COMMON_SPECULATIVE_TYPE_{word.upper()}")]
        if job.get("sizes"):
            chosen = getattr(found.speculative, word)
            chosen.size_n, chosen.size_m = job["sizes"]
    return found


def say(answers: Any, line: dict[str, Any]) -> None:
    print(json.dumps(line), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
