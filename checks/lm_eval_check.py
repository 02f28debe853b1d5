"""Does lm-evaluation-harness work with the server? SmolLM2 on loopback, two small tasks, written here.

    python -m venv .venv-clients && .venv-clients/bin/pip install 'lm_eval[api]' 'torch==2.13.0'
    python checks/lm_eval_check.py --python .venv-clients/bin/python

`generate_until` (sums, as in GSM8K: greedy, stop strings) through local-completions, whose answers must be
those of `coral.load().generate`, and `multiple_choice`, whose log-likelihoods come from `echo` and `logprobs`
and must be the sums of the target's own log-softmax, by transformers' code. In float32, where the two agree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from own_server import OwnServer, own_server

import coral
from coral.target.default import SMOLLM2

SUMS = [(3, 4), (12, 9), (25, 17), (40, 8), (7, 7), (19, 23), (5, 16), (31, 31)]
CHOICES = [
    ("The capital of France is", ["Paris", "Berlin", "a banana"], 0),
    ("Water freezes at zero degrees", ["Celsius", "of music", "Thursday"], 0),
    ("Corals live in the", ["sea", "clouds", "oven"], 0),
    ("The opposite of hot is", ["blue", "cold", "seven"], 1),
]
PREAMBLE = "Question: What is 2 + 3?\nAnswer: 5\n\n"
NEAR = 1e-3  # what rounding may add to a sum of log-probabilities


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has lm_eval")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, own_server("--dtype", "float32") as server:
        place = Path(name)
        write_tasks(place)
        evaluate(options.python, place, server)
        sums, choices = samples(place, "coral_sums"), samples(place, "coral_choices")
    llm = coral.load(dtype="float32")
    equal = sum(
        llm.generate(s["arguments"]["gen_args_0"]["arg_0"], chat=False, max_new_tokens=8, stop="\n").strip()
        == s["resps"][0][0].strip()
        for s in sums
    )
    near = [close(llm, s, i) for s in choices for i in range(len(s["doc"]["options"]))]
    print(f"{equal} of {len(sums)} answers are generate's, {sum(near)} of {len(near)} log-likelihoods agree")
    good = equal == len(sums) == len(SUMS) and all(near) and len(choices) == len(CHOICES)
    return 0 if good else 1


def write_tasks(place: Path) -> None:
    """Two tasks as lm_eval reads them: a YAML file, which JSON is, and a JSONL file each."""
    questions = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in SUMS]
    choices = [{"context": context, "options": options, "gold": gold} for context, options, gold in CHOICES]
    common = {"test_split": "test", "num_fewshot": 0, "dataset_path": "json"}
    tasks: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "coral_sums": (questions, {
            "output_type": "generate_until", "doc_to_target": " {{answer}}",
            "doc_to_text": PREAMBLE + "Question: {{question}}\nAnswer:",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }),
        "coral_choices": (choices, {
            "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }),
    }  # fmt: skip
    for task, (records, options) in tasks.items():
        data = place / f"{task}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (place / f"{task}.yaml").write_text(json.dumps({"task": task, **common, **files, **options}))


def evaluate(python: Path, place: Path, server: OwnServer) -> None:
    arguments = {
        "model": SMOLLM2.name, "base_url": f"{server.url}/v1/completions", "tokenizer": tokenizer(place),
        "tokenizer_backend": "huggingface", "num_concurrent": 4, "max_retries": 1,
    }  # fmt: skip
    command = [python, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += [
        "--tasks",
        "coral_sums,coral_choices",
        "--include_path",
        place,
        "--output_path",
        place / "out",
    ]
    done = subprocess.run([*map(str, command), "--log_samples"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"lm_eval ended with {done.returncode}:\n{done.stderr[-3000:]}")
    print(done.stdout[-1200:])


def tokenizer(place: Path) -> Path:
    """The target's tokenizer as a directory that transformers reads."""
    words = coral.load(dtype="float32").tokenizer
    words.save_pretrained(place / "words")
    return place / "words"


def samples(place: Path, task: str) -> list[dict[str, Any]]:
    (path,) = (place / "out").rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.inference_mode()
def close(llm: Any, sample: dict[str, Any], index: int) -> bool:
    """Whether a choice's log-likelihood is the target's own, by transformers' code."""
    context, choice = (sample["arguments"][f"gen_args_{index}"][f"arg_{i}"] for i in range(2))
    said = float(sample["resps"][index][0][0])
    ids, start = llm.encode(context + choice, chat=False), len(llm.encode(context, chat=False))
    log_probs = llm.target.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    ours = sum(float(log_probs[i - 1, ids[i]]) for i in range(start, len(ids)))
    return abs(ours - said) <= NEAR


if __name__ == "__main__":
    sys.exit(main())
