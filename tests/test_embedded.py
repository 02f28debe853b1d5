"""The pair that the package ships: small, whole, fast and lossless."""

import pytest

import coral
from coral.api import EMBEDDED
from coral.decoding.generate import acceptance_length
from coral.drafter import checkpoint

PROMPTS = ("What is the capital of France?", "Write a Python function that checks whether a number is even.")


@pytest.fixture(scope="module")
def shipped() -> coral.Pair:
    return coral.load(dtype="float32", fallback=False)  # tau must not depend on the clock


def test_together_they_are_small_enough_to_ship() -> None:
    """Stops an optimiser state or a float32 copy from getting into the package."""
    sizes = {path: path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 40e6, sizes
    assert {path.parent.name for path in sizes if path.name == "model.safetensors"} == {"target", "drafter"}


def test_the_drafter_is_the_targets_own(shipped: coral.Pair) -> None:
    """Stops a target that was replaced without its drafter."""
    checkpoint.load(EMBEDDED / "drafter", shipped.target)
    assert shipped.tokenizer.chat_template


@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_is_faster_and_writes_the_same(shipped: coral.Pair, prompt: str) -> None:
    """Stops a drafter that was trained for nothing, and text that depends on it."""
    plain = coral.load(shipped.target)
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 48, "temperature": temperature, "seed": 5, "ignore_eos": True}
        cycles = list(shipped.generate(prompt, **options))
        accelerated = [token for cycle in cycles for token in cycle.tokens]
        assert accelerated == [token for cycle in plain.generate(prompt, **options) for token in cycle.tokens]
        assert temperature > 0 or acceptance_length(cycles) > 1.5
