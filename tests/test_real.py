"""With SmolLM2 and the package's drafter: `make test-real`, skipped where the model cannot be fetched."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from test_readme import blocks

import coral as library
from coral.decoding.cycle import acceptance_length
from coral.decoding.fallback import Fallback
from coral.errors import CoralError
from coral.target import default as models
from coral.target.target import Target
from coral.tree import TreeSize

pytestmark = pytest.mark.real
PROMPTS = (
    "Give me three tips for staying healthy.",
    "A train travels 60 miles per hour for 3 hours. How far does it go?",
    "Write a Python function that returns the sum of a list of numbers.",
)


@pytest.fixture(scope="module", autouse=True)
def fetched() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        try:
            models.fetch()
        except CoralError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def pair(fetched: None) -> library.LLM:
    return library.load(fallback=False)  # tau must not depend on the clock


def write(pair: library.LLM, prompt: str, **options: object) -> tuple[list[int], float]:
    """The ids of a text and its tau."""
    cycles = list(pair.stream(prompt, max_new_tokens=64, **options))
    return [token for cycle in cycles for token in cycle.tokens], acceptance_length(cycles)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_of_packed_weights_is_their_plain_text(temperature: float) -> None:
    """Stops blocks of the real file (Q4_1, a head in Q8_0) that trees multiply otherwise than plain steps."""
    pair = library.load(dtype="packed", fallback=False)
    assert pair.target.precision == "packed"
    plain = library.load(pair.target)
    for prompt in PROMPTS:
        ids, tau = write(pair, prompt, temperature=temperature, seed=3)
        assert ids == write(plain, prompt, temperature=temperature, seed=3)[0]
        assert len(ids) > 20 and tau > 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_is_plain_text_and_drafts_are_accepted(pair: library.LLM, temperature: float) -> None:
    """Stops a drafter that was trained for nothing or for other features, and text that depends on it."""
    plain, taus = library.load(pair.target), []
    for prompt in PROMPTS:
        ids, tau = write(pair, prompt, temperature=temperature, seed=3)
        assert ids == write(plain, prompt, temperature=temperature, seed=3)[0]
        taus.append(tau)
    assert temperature > 0 or sum(taus) / len(taus) > 1.05


def test_it_answers() -> None:
    """Stops a model whose weights are read in another order, or whose chat template is lost."""
    assert "Paris" in library.load().generate("What is the capital of France?", max_new_tokens=24)


@pytest.mark.usefixtures("fetched")
def test_the_same_model_in_other_numbers_is_drafted_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Stops a drafter that is refused for the hub's own weights, or accepts much less there than it did.

    In float32, in one tree: in bfloat16 three short texts are others on another processor, and the built-in
    tree follows what rows cost there.
    """
    tree = TreeSize(2, 6, 7, 0.1)
    pair = library.load(dtype="float32", fallback=False, tree=tree)
    model = copy.deepcopy(pair.target.model)
    with torch.no_grad():
        for weight in {id(p): p for p in model.parameters() if p.dim() == 2}.values():
            blocks_ = weight.float().unflatten(1, (-1, 32))  # four bits each, as Q4_0 has them
            step = blocks_.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
            weight.copy_(((blocks_ / step).round() * step).flatten(1))
    other = library.load(
        Target(model, pair.tokenizer, name="requantised"), models.DRAFTER, fallback=False, tree=tree
    )
    assert "requantised is HuggingFaceTB/SmolLM2-135M-Instruct in other numbers" in capsys.readouterr().err
    plain = library.load(other.target)
    own, theirs = 0.0, 0.0
    for prompt in PROMPTS:
        ids, tau = write(other, prompt)
        assert ids == write(plain, prompt)[0]
        own, theirs = own + write(pair, prompt)[1], theirs + tau
    assert theirs > 0.75 * own  # 0.84 to 0.9 by processor: three short texts


def test_the_demo_and_the_readme(coral, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a first impression that is a stack trace, or that a drafter slows down in its text."""
    result = coral("demo", "--max-new-tokens", 32)
    assert result.code == 0 and "toy" not in result.out
    assert re.search(r"CORAL +\S* +\d+ .*x.* yes", result.out.replace("│", " ")), result.out
    assert isinstance(library.load().proposer, Fallback)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
