"""Configuration: everything that is not understood is refused, with the key."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from coral import config
from coral.errors import CoralError
from coral.training.recipe import RECIPES, load_recipe


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    size: int = 3
    inner: Inner = field(default_factory=Inner)


def test_overrides_win_and_reach_into_groups():
    """Stops: an override that is parsed but not applied, and 1e-3 read as text (YAML 1.1)."""
    loaded = config.load(Outer, {"name": "x", "inner": {"kind": "b"}}, ["size=7", "inner.rate=1e-3"])
    assert loaded == Outer("x", 7, Inner(0.001, "b"))


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"name": "x", "siez": 1}, [], "unknown key siez; did you mean size"),
        ({"name": "x"}, ["inner.rat=1"], "unknown key inner.rat; did you mean inner.rate"),
        ({"name": "x"}, ["inner.rate=fast"], "inner.rate must be float, not 'fast'"),
        ({"name": "x"}, ["inner.kind=c"], r"inner.kind must be Literal\['a', 'b'\]"),
        ({"name": "x", "inner": 3}, [], "inner must hold keys"),
        ({"name": "x"}, ["size"], "write it as key=value"),
        ({"name": "x"}, ["name.deep=1"], "holds one value"),
        ({}, [], "name is missing"),
    ],
)
def test_mistakes_name_the_key(values, overrides, message):
    """Stops: a misspelt option silently doing nothing for hours of training."""
    with pytest.raises(CoralError, match=message):
        config.load(Outer, values, overrides)


def test_files_that_are_not_configurations(tmp_path):
    """Stops: stack traces from YAML."""
    with pytest.raises(CoralError, match="cannot read"):
        config.load(Outer, tmp_path / "none.yaml")
    for text, message in (("- 1\n", "must hold"), ("a: [", "is not YAML")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(CoralError, match=message):
            config.load(Outer, tmp_path / "x.yaml")


def test_recipes_differ_where_their_papers_differ():
    """Stops: a recipe that names a method and trains another."""
    eagle2, hass, coral = (load_recipe(name) for name in ("eagle2", "hass", "coral"))
    eagle3, coral3 = load_recipe("eagle3"), load_recipe("coral3")
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"eagle2", "hass", "coral", "eagle3", "coral3"}
    assert (eagle2.steps, eagle2.loss.divergence_weight, eagle2.loss.top_k_weight) == (1, 0.1, 0.0)
    assert (hass.steps, hass.loss.top_k_weight, hass.alignment.kind) == (3, 1.0, "none")
    assert coral.loss == hass.loss and coral.alignment.kind == "csra"
    assert eagle3.kind == coral3.kind == "eagle3" and eagle3.steps == coral3.steps == 7 and not eagle3.detach
    assert eagle3.loss.step_decay == 0.8 and eagle3.loss.renormalised and eagle3.loss.regression == 0
    assert eagle3.alignment.kind == "none" and coral3.alignment == coral.alignment
    with pytest.raises(CoralError, match="coral, coral3, eagle2, eagle3, hass"):
        load_recipe("medusa")
    with pytest.raises(CoralError, match="steps must be at least 1"):
        load_recipe("coral", ["steps=0"])
