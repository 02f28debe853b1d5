"""A drafter drafts for its model in other numbers, and for no other model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

import coral as library
from coral.errors import CoralError
from coral.target.likeness import Likeness
from coral.target.record import TargetRecord, check_target


def changed(models: Path, directory: Path, noise: float) -> Path:
    """The tiny target with noise in all of its matrices, of so many standard deviations."""
    model = AutoModelForCausalLM.from_pretrained(models / "target")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_another_quantisation_is_drafted_for_with_a_note(coral, models: Path, tmp_path: Path) -> None:
    """Stops a drafter that is refused for the original weights of the file that it was trained on, a text
    that the drafter has a say in, and a note in the text.
    """
    directory = changed(models, tmp_path / "requantised", noise=0.1)  # that of four bits
    command = ("generate", "hi", "--target", directory, "--max-new-tokens", 8, "--backend=transformers")
    drafted = coral(*command, "--drafter", models / "drafter")
    assert drafted.code == 0 and drafted.out == coral(*command).out
    assert drafted.err.count("\n") == 1 and "in other numbers" in drafted.err
    assert "in other numbers" not in coral("generate", "hi", "--target", models / "target",
                                           "--drafter", models / "drafter").err  # fmt: skip


def test_another_model_is_refused(models: Path, tmp_path: Path) -> None:
    """Stops a drafter that drafts nonsense for a model of the same shape."""
    for noise in (1.0, None):
        other = models / "other" if noise is None else changed(models, tmp_path / "far", noise)
        with pytest.raises(CoralError, match=r"other weights \(its LM head's cosine with theirs is -?0\."):
            library.load(other, models / "drafter")
    record = json.loads((models / "drafter" / "coral" / "config.json").read_text())["target"]
    del record["likeness"]  # as records were before
    near = library.Target.load(changed(models, tmp_path / "near", noise=0.1))
    with pytest.raises(CoralError, match="has other weights; use that target"):
        check_target(models / "drafter", TargetRecord(**record), TargetRecord.of(near))


def test_family_ids_and_rows_tell_models_apart() -> None:
    """Stops ids that mean other tokens, layers that are missing, and rows that stand in another order."""
    weight, facts = torch.randn(64, 48), SimpleNamespace(family="llama", num_layers=2)
    tokenizer = tiny_tokenizer()
    target = SimpleNamespace(head_weight=weight, facts=facts, tokenizer=tokenizer)

    def difference(**changes: object) -> str | None:
        return Likeness.of(target).difference(Likeness.of(SimpleNamespace(**{**vars(target), **changes})))

    assert difference() is None
    assert difference(tokenizer=None) is None  # nothing to compare
    other = SimpleNamespace(family="llama", num_layers=3)
    assert difference(facts=other) == "is a llama of 3 layers, not a llama of 2 layers"
    assert "cosine" in (difference(head_weight=weight.roll(1, 0)) or "")
    assert difference(head_weight=weight.half()) is None
    tokenizer.add_tokens(["[PAD270]"])  # as files that fill up the vocabulary do
    assert difference() is None
    merged = tiny_tokenizer()
    swapped = json.loads(merged.backend_tokenizer.to_str())
    swapped["model"]["vocab"]["th"], swapped["model"]["vocab"]["in"] = (
        swapped["model"]["vocab"]["in"],
        swapped["model"]["vocab"]["th"],
    )
    merged._tokenizer = type(merged.backend_tokenizer).from_str(json.dumps(swapped))
    assert difference(tokenizer=merged) == "has another tokenizer"
