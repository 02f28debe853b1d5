"""What the package ships, and the toy pair that stays in the checkout: small, whole, fast and lossless."""

from __future__ import annotations

from pathlib import Path

import pytest

import coral
from coral.decoding.cycle import acceptance_length
from coral.drafters import checkpoint
from coral.target.default import DRAFTER, SMOLLM2, TOY

PROMPTS = ("What is the capital of France?", "Write a Python function that checks whether a number is even.")


@pytest.fixture(scope="module")
def pair() -> coral.LLM:
    return coral.load(TOY / "target", TOY / "drafter", dtype="float32", fallback=False)  # not by the clock


def test_the_package_is_small_enough_to_ship() -> None:
    """Stops an optimiser state, a float32 copy or a whole model from getting into the wheel, which holds all
    that lies in src/coral.
    """
    package = Path(coral.__file__).parent
    files = {f for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert sum(f.stat().st_size for f in files) <= 15e6
    assert {f.parent for f in files if f.suffix in (".safetensors", ".pt", ".bin", ".gguf")} <= {
        DRAFTER,
        DRAFTER / "coral" / "heads",
    }
    assert 'packages = ["src/coral"]' in (package.parents[1] / "pyproject.toml").read_text()


def test_the_shipped_drafter_is_for_the_default_model() -> None:
    """Stops a record that names the directory of whoever trained it: `coral export` serves that name."""
    record = checkpoint.read_config(DRAFTER)["target"]
    assert record["name"] == SMOLLM2.name and record["likeness"]
    assert checkpoint.load(DRAFTER).fc.weight.shape[0] == record["hidden_size"]


def test_the_toy_drafter_is_the_toys_own(pair: coral.LLM) -> None:
    """Stops a target that was replaced without its drafter."""
    checkpoint.load(TOY / "drafter", pair.target)
    assert pair.tokenizer.chat_template


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_toy_is_faster_and_writes_the_same(pair: coral.LLM, prompt: str) -> None:
    """Stops a drafter that was trained for nothing, and text that depends on it."""
    plain = coral.load(pair.target)
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 48, "temperature": temperature, "seed": 5, "ignore_eos": True}
        cycles = list(pair.stream(prompt, **options))
        accelerated = [token for cycle in cycles for token in cycle.tokens]
        assert accelerated == [token for cycle in plain.stream(prompt, **options) for token in cycle.tokens]
        assert temperature > 0 or acceptance_length(cycles) > 1.5
