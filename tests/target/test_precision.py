"""Every command on targets as real checkpoints are: in bfloat16, float16 and float32, heads tied to the
embedding or not, with the biases of Qwen2; models made in float32 for a test hide what breaks on them.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from test_cli import conversations
from tiny_pair import NATIVE, save_target

from coral.drafters import checkpoint
from coral.target.native import why_not_native
from coral.target.target import Target


class Case(NamedTuple):
    """family, dtype on disk, whether the head is tied, further options of the config, and whether the native
    forward is to take it, where there is a compiler."""

    family: str
    dtype: torch.dtype
    tied: bool
    changes: dict[str, Any]
    native: bool


GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 16}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
CASES = {
    "llama bfloat16 tied": Case("llama", torch.bfloat16, True, NATIVE, True),  # SmolLM2, Llama 3.2
    "llama float16 untied": Case("llama", torch.float16, False, NATIVE, False),  # Llama 2, Vicuna
    "mistral bfloat16 untied": Case("mistral", torch.bfloat16, False, NATIVE, True),
    "qwen2 bfloat16 untied": Case("qwen2", torch.bfloat16, False, NATIVE, True),  # Qwen2.5-7B
    "qwen2 float16 tied": Case("qwen2", torch.float16, True, {}, False),
    "qwen2 float32 tied": Case("qwen2", torch.float32, True, NATIVE, True),
    "qwen3 bfloat16 tied": Case("qwen3", torch.bfloat16, True, NATIVE, True),
    "gemma3 bfloat16 tied": Case("gemma3", torch.bfloat16, True, NATIVE | GEMMA, True),
    "phi3 bfloat16 untied": Case("phi3", torch.bfloat16, False, NATIVE | PARTIAL, True),
    "olmo2 bfloat16 untied": Case("olmo2", torch.bfloat16, False, NATIVE, True),
}


OFTEN = "llama bfloat16 tied"  # in the default run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == OFTEN else pytest.mark.slow) for name in CASES]
)
def test_every_command(coral, tmp_path: Path, name: str) -> None:
    """From conversations to an imported export, with `--dtype auto` throughout: stops two dtypes that meet in
    one product, a bias that a path leaves out, and text that depends on what drafts."""
    case = CASES[name]
    target = tmp_path / "target"
    save_target(
        target,
        family=case.family,
        dtype=case.dtype,
        tie_word_embeddings=case.tied,
        vocab_size=288,  # more than the tokenizer has, as in Qwen2
        num_hidden_layers=1,
        **case.changes,
    )
    loaded = Target.load(target)
    assert loaded.dtype == case.dtype and (why_not_native(loaded) is None) <= case.native
    at = ("--target", target)

    def run(*command: object, **more: Any) -> Any:
        result = coral(*command, **more)
        assert result.code == 0, f"{command}: {result.err}"
        assert not re.search(r"\bnan\b|\binf\b", result.out), result.out
        return result

    # Answers, rows, features.
    answers, data = tmp_path / "answers.jsonl", tmp_path / "data"
    source = conversations(tmp_path / "c.jsonl", 6)
    run("data", "regenerate", source, *at, "--output", answers, "--max-new-tokens", 6, "--batch-size", 3)
    run("data", "prepare", source, "--tokenizer", target, "--output", data, "--held-out", 1)
    run("data", "features", data, *at, "--output", tmp_path / "features", "--store", "fp8")

    # A drafter, of rows and of features; its acceptance is measured beside the target, in the target's dtype.
    drafter = tmp_path / "drafter"
    train = ("train", *at, "--set", "batch_size=2", "--set", "reports.log_every=1", "--updates", 2)
    run(*train, "--data", tmp_path / "features", "--output", tmp_path / "other", "--recipe", "eagle2")
    assert "acceptance length: chain" in run(*train, "--data", data, "--output", drafter).err
    taus = checkpoint.read_config(drafter)["metrics"]["acceptance"]
    assert all(1 <= taus[tree] < 8 for tree in ("chain", "tree"))
    lines = (drafter / "coral" / "training" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))

    # Heads; the drafter in the target's dtype, and both in others.
    make = ("train-head", drafter, "--data", data, *at)
    run(*make, "--kind", "static", "--size", 40)
    run(*make, "--kind", "low_rank", "--rank", 8, "--rescored", 5, "--batches", 2, "--updates", 2)
    run(*make, "--kind", "routed", "--groups", 4, "--active", 2, "--core", 9, "--updates", 2)
    ask = ("generate", "the the", *at, "--max-new-tokens", 8, "--no-fallback")
    run(*ask, "--drafter", f"{drafter}+ngram", "--mark")
    run(*ask, "--drafter", f"{drafter}+low_rank", "--temperature", 0.8, "--top-p", 0.9)
    for dtype in {"float32", "bfloat16", "float16"} - {str(case.dtype).removeprefix("torch.")}:
        run(*ask, "--drafter", drafter, "--dtype", dtype)
    run("tune", drafter, *at, "--prompts", 1, "--max-new-tokens", 4, "--head", "static")

    # Each text against plain decoding; in float16 and bfloat16 beside what rounding explains.
    suite, output = tmp_path / "mine.jsonl", tmp_path / "out"
    suite.write_text(json.dumps({"id": 1, "turns": ["ask 1"]}) + "\n")
    bench = ["bench", *at, "--suite", suite, "--max-new-tokens", 10, "--output", output]
    bench += ["--temperature", 0, "--temperature", 1, "--ignore-eos"]
    for head in ("full", "static", "low_rank", "routed", "in_context+ngram"):
        bench += ["--drafter", f"{head}={drafter}+{head}"]
    run(*bench)
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert {row["dtype"] for row in rows} == {str(case.dtype).removeprefix("torch.")}
    assert [row["drafter"] for row in rows if row["wrong"]] == []
    ours = [row for row in rows if not row["drafter"].startswith("hf_")]
    if why_not_native(loaded) is None or case.dtype == torch.float32:
        assert all(row["near_tie"] == 0 for row in ours)
    run("bench", "compare", "static", "ngram", output)

    # Other engines, and back.
    trained = load_file(drafter / "model.safetensors")
    fits = (
        loaded.hidden_size == loaded.config.num_attention_heads * loaded.decoder.layers[0].self_attn.head_dim
    )
    for engine in ("vllm", "sglang", *(("eagle",) if fits else ())):
        out = tmp_path / engine
        run("export", drafter, "--to", engine, "--output", out, "--dtype", "bfloat16")
        run("import", out, *at, "--output", tmp_path / f"{engine}-back")
        back = load_file(tmp_path / f"{engine}-back" / "model.safetensors")
        folded = {"fc.weight"} if case.family == "gemma3" else set()  # with what multiplies its embedding
        assert all(
            torch.equal(tensor, trained[name].bfloat16())
            for name, tensor in back.items()
            if name not in folded
        )
    run(*ask, "--drafter", tmp_path / "vllm-back")
