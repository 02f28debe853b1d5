"""Training beside targets in the dtypes that real checkpoints have."""

import io
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny import V, prompt_of, tiny_model
from tiny_training import tiny_data

from coral.bench.acceptance import acceptance
from coral.drafters import checkpoint
from coral.target.target import Target
from coral.training.loop import train
from coral.training.recipe import Limits, Reports, config_type

CONFIG = config_type("feature")(
    steps=2, batch_size=3, limits=Limits(updates=4), reports=Reports(log_every=1, acceptance_every=2)
)


def target_of(kind: str, dtype: torch.dtype) -> Target:
    return Target(deepcopy(tiny_model(kind)).to(dtype), name=kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_measures_and_ends_beside_a_target_of_any_dtype(tmp_path, kind, dtype, precision):
    """Stops a float32 drafter beside a bfloat16 target: "expected m1 and m2 to have the same dtype"."""
    target, prompts = target_of(kind, dtype), [prompt_of(6), prompt_of(9)]
    seen = []

    def measured(drafter):
        seen.append(acceptance(target, drafter, prompts, 8))
        assert drafter.fc.weight.dtype == torch.float32  # what learns keeps its precision
        return seen[-1]

    console = Console(file=io.StringIO())
    outcome = train(
        target,
        tiny_data(vocab_size=V),
        tmp_path / "drafter",
        replace(CONFIG, precision=precision),
        acceptance=measured,
        console=console,
    )
    assert outcome.finished and outcome.skipped == 0 and len(seen) == 2
    fitted = checkpoint.load(tmp_path / "drafter", target, dtype=dtype)
    assert seen[-1] == acceptance(target, fitted, prompts, 8)
