"""llama.cpp's side of llama_cpp_check.py, run by the Python of an environment with xllamacpp:
`python llama_cpp_side.py JOB ANSWER`.

JOB is JSON: `target` and `drafter` (GGUF files; drafter null: none), `prompts` (token ids), `length` (tokens
to write at most), `draft_tokens`, `threads`, `at_once` (texts that are written together), `exact` (keys and
values in float32, no flash attention). ANSWER gets `texts`, `drafted` and `accepted` of each, `cycles` and
`accepted_by_position` as llama.cpp counts them, `seconds` of each, and `version`.
"""

import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp


def main(job_path: str, answer_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    server = xllamacpp.Server(settings(job))
    url = server.listening_address

    def write(prompt: list[int]) -> dict[str, Any]:
        asked = {
            "prompt": prompt,
            "n_predict": job["length"],
            "temperature": 0.0,
            "top_k": 1,
            "cache_prompt": False,  # every prompt pays for its own prefill
            "return_tokens": True,
        }
        begin = time.perf_counter()
        request = Request(
            f"{url}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request) as response:
            return json.load(response) | {"seconds": time.perf_counter() - begin}

    with ThreadPoolExecutor(job["at_once"]) as slots:
        answers = list(slots.map(write, job["prompts"]))
    with urlopen(f"{url}/metrics") as response:
        counters = response.read().decode()
    positions = dict(
        re.findall(r"spec_decode_num_accepted_tokens_per_pos_total{\D*(\d+)\D*} (\d+)", counters)
    )
    cycles = re.search(r"^\S*spec_decode_num_drafts_total\S* (\d+)", counters, re.MULTILINE)
    found = {
        "texts": [answer["tokens"] for answer in answers],
        "drafted": [answer["timings"].get("draft_n", 0) for answer in answers],
        "accepted": [answer["timings"].get("draft_n_accepted", 0) for answer in answers],
        "cycles": int(cycles[1]) if cycles else 0,
        "accepted_by_position": [int(positions.get(str(i), 0)) for i in range(job["draft_tokens"])],
        "seconds": [answer["seconds"] for answer in answers],
        "version": xllamacpp.__version__,
    }
    Path(answer_path).write_text(json.dumps(found))


def settings(job: dict[str, Any]) -> Any:
    """llama-server's own defaults, but for the threads, one slot and the drafter."""
    found = xllamacpp.CommonParams()
    found.model.path = job["target"]
    found.n_ctx = job["at_once"] * (max(map(len, job["prompts"])) + job["length"] + 64)
    found.n_parallel, found.port, found.verbosity, found.endpoint_metrics = job["at_once"], 0, 1, True
    draft = found.speculative.draft
    for threads in (found.cpuparams, found.cpuparams_batch, draft.cpuparams, draft.cpuparams_batch):
        threads.n_threads = job["threads"]
    if job["drafter"]:
        kinds = xllamacpp.common_speculative_type
        found.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
        draft.mparams.path, draft.n_max = job["drafter"], job["draft_tokens"]
        draft.backend_sampling = job["at_once"] == 1  # it mixes up the drafts of several texts
    if job["exact"]:
        found.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        for cache in (found, draft):
            cache.cache_type_k = cache.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
