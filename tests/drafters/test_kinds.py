"""Kinds of drafters and of heads: what a new one takes is a module and a word."""

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from kind_linear import Drafter as LinearDrafter
from tiny import HEADS, tiny_target
from tiny_pair import save_target
from tiny_training import tiny_data
from tiny_training import tiny_target as training_target

import coral
from coral.bench.acceptance import acceptance
from coral.drafters import checkpoint, kinds
from coral.drafters.heads import store as heads
from coral.errors import CoralError
from coral.export import write
from coral.hub.card import card
from coral.target.record import TargetRecord
from coral.training.heads import make_static
from coral.training.loop import train
from coral.training.recipe import Limits, config_type, load_recipe


def missing(found: Any, protocol: Any) -> list[str]:
    """What a module or class lacks of a protocol, or has with other parameters."""

    def parameters(owner: Any, name: str) -> list[str]:
        return [each for each in inspect.signature(getattr(owner, name)).parameters if each != "self"]

    members = {name: member for name, member in vars(protocol).items() if name[0] != "_"}
    functions = {name for name, member in members.items() if inspect.isfunction(member)}
    lacks = [name for name in {*members, *protocol.__annotations__} if not hasattr(found, name)]
    return lacks + [n for n in functions - {*lacks} if parameters(found, n) != parameters(protocol, n)]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more kinds, each made known by its module and a word."""
    for kind in ("echo", "linear"):
        monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, kind))
        monkeypatch.setitem(sys.modules, f"coral.drafters.{kind}", import_module(f"kind_{kind}"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    save_target(tmp_path / "target")
    return tmp_path / "target"


def save(kind: str, config: Any, target: Path) -> Path:
    """A drafter of this kind with random weights, in a directory."""
    torch.manual_seed(4)
    record, directory = TargetRecord.of(coral.Target.load(target)), target.parent / kind
    checkpoint.save(kinds.find(kind).Drafter(config), directory, target=record)
    return directory


def test_every_kind_of_drafter_says_what_the_library_asks(toys: None) -> None:
    """Stops a kind that lacks a function until someone trains, tunes or exports one."""
    for kind in kinds.KINDS:
        found = kinds.find(kind)
        assert missing(found, kinds.Kind) == [] and found.Drafter.kind == kind
        assert found.Options() == found.Options()  # all have defaults
    with pytest.raises(
        CoralError, match="'medusa' of drafters is not known; use feature, eagle3, lookup, echo"
    ):
        kinds.find("medusa")


def test_every_kind_of_head_says_what_the_library_asks() -> None:
    """Stops a head that cannot be loaded, or lacks what native drafting or the bench asks of one."""
    for kind in heads.HEADS[1:]:
        assert missing(heads.find(kind), heads.Kind) == []
    for make in (*HEADS.values(), lambda target: heads.of_target(target, "full")):
        assert missing(make(tiny_target()), heads.Head) == []


def test_what_is_missing_is_seen() -> None:
    """A test of absence passes on anything if it looks at nothing."""
    assert set(missing(import_module("math"), kinds.Kind)) >= {"Options", "Drafter", "draft", "proposer"}
    odd = type("Odd", (), {"build": lambda target: None})
    assert missing(odd, heads.Kind) == ["build"]


@pytest.mark.parametrize("kind", ["echo", "linear", "lookup"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_of_any_kind_is_loaded_and_lossless(
    toys: None, target: Path, kind: str, temperature: float
) -> None:
    """Stops a checkpoint, a head or a loop that takes every drafter for an EAGLE network."""
    made = kinds.find(kind)
    config = made.Config(16) if kind == "linear" else made.Config()
    directory = save(kind, config, target)
    assert checkpoint.load(directory).config == config
    options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 40, "ignore_eos": True}
    expected = coral.load(target).generate("a coral reef", **options)
    for drafter in (directory, f"{directory}+ngram", checkpoint.load(directory)):
        pair = coral.load(target, drafter, fallback=False)
        assert pair.generate("a coral reef", **options) == expected
        drafted = [cycle.num_drafted for cycle in pair.stream("a coral reef", **options)]
        assert max(drafted) > 0 or kind == "lookup"


def test_a_checkpoint_of_another_kind_is_checked_as_well(toys: None, target: Path) -> None:
    """Stops weights, options and target states that are checked for one kind alone."""
    directory = save("linear", kinds.find("linear").Config(16), target)
    path = directory / "coral" / "config.json"
    assert not (directory / "config.json").exists()  # no engine knows it
    whole = path.read_text()
    for old, new, message in (
        ('"hidden_size": 16\n', '"hidden_size": 17\n', r"matrix.weight has shape \(16, 16\)"),
        ('"hidden_size": 16\n', '"hidden_size": "16"\n', "drafter.hidden_size"),
        ("    -1\n", "    3\n", r"target states \[3\], but in this version drafters of kind 'linear' read"),
        ('"kind": "linear"', '"kind": "eagle"', "'eagle', but this version reads format 1, kind feature"),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(CoralError, match=message):
            checkpoint.load(directory)
    path.write_text(whole)
    with pytest.raises(CoralError, match="cannot carry drafters of kind 'linear'"):
        write.export(directory, "vllm", target.parent / "out", served="")
    text = card(directory, "me/linear")
    assert "vLLM cannot serve it, for it knows no drafters of kind 'linear'" in text and "- eagle" not in text


def test_a_head_is_not_asked_of_a_drafter_without_one(toys: None, target: Path) -> None:
    """Stops a measurement with the full head that fails where there is none, and a head made in vain."""
    directory = save("echo", kinds.find("echo").Config(), target)
    loaded, prompts = coral.Target.load(target), [[5, 6, 7]]
    found = acceptance(loaded, checkpoint.load(directory), prompts, 8)
    assert set(found) == {"chain", "tree"}
    with pytest.raises(CoralError, match="kind 'echo' take no other LM head; use this one as it is"):
        make_static(directory, loaded, tiny_data().dataset)


def test_a_new_kind_is_trained_by_the_loop(toys: None, tmp_path: Path) -> None:
    """Stops a loop, a report, a resume or a recipe that knows the sums or options of one kind."""
    target, config = training_target(), load_recipe("eagle2", ["steps=2"])
    assert config == config_type("feature")(**vars(config)) and config.kind == "feature"
    recipe = tmp_path / "linear.yaml"
    recipe.write_text("kind: linear\nscale: 0.5\nbatch_size: 2\nlimits: {updates: 2}\n")
    with pytest.raises(CoralError, match="unknown key steps"):
        load_recipe(recipe, ["steps=2"])
    config = load_recipe(recipe)
    assert train(target, tiny_data(), tmp_path / "o", config).update == 2
    trained = checkpoint.load(tmp_path / "o", target)
    assert isinstance(trained, LinearDrafter) and not trained.matrix.weight.equal(0.5 * torch.eye(16))
    lines = (tmp_path / "o" / "coral" / "training" / "metrics.jsonl").read_text()
    assert lines == "" or '"distance"' in lines
    longer = load_recipe(recipe, ["limits.updates=4", "reports.log_every=1"])
    assert train(target, tiny_data(), tmp_path / "o", longer).update == 4
    assert '"distance"' in (tmp_path / "o" / "coral" / "training" / "metrics.jsonl").read_text()
    with pytest.raises(CoralError, match="holds a drafter of kind 'linear', and not 'feature'; use kind"):
        train(target, tiny_data(), tmp_path / "o", config_type("feature")(limits=Limits(updates=4)))
    with pytest.raises(CoralError, match="'echo' have nothing to train"):
        train(target, tiny_data(), tmp_path / "e", config_type("echo")(limits=Limits(updates=1)))
