"""What drafts is one value: how a name is read, and that it is what `coral.load` and transformers hand on."""

from pathlib import Path

import pytest

import coral
from coral import Drafting, TreeSize
from coral.decoding.fallback import Fallback
from coral.decoding.merged import Merged
from coral.decoding.plain import Plain
from coral.errors import CoralError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, Drafting()),
        ("plain", Drafting()),
        ("ngram", Drafting(lookup=True)),
        ("d", Drafting("d")),
        ("d+static", Drafting("d", "static")),
        ("d+static+ngram", Drafting("d", "static", lookup=True)),
        ("d+ngram+static", Drafting("d", "static", lookup=True)),
        ("me/d@v1+ngram", Drafting("me/d@v1", lookup=True)),
        ("c++", Drafting("c++")),
        ("d+v2", Drafting("d+v2")),
        ("+ngram", Drafting("+ngram")),
        (Path("d+ngram"), Drafting(Path("d+ngram"))),
    ],
)
def test_a_name_is_read_in_one_way(name: object, expected: Drafting) -> None:
    """Stops a directory whose own name holds a plus from being cut, and a part that one command reads."""
    assert Drafting.parse(name) == expected
    assert Drafting.parse(name, head=None, tree=TreeSize(1, 2, 2)).tree == TreeSize(1, 2, 2)


def test_a_head_in_the_name_goes_before_the_option() -> None:
    """Stops --head from overruling DIR+static, of which several may stand in one bench."""
    assert Drafting.parse("d+static", head="full").head == "static"
    assert Drafting.parse("d+ngram", head="full") == Drafting("d", "full", lookup=True)


def test_a_drafting_is_taken_as_it_is(models: Path) -> None:
    """Stops an option beside a Drafting that is dropped without a word, and fields that do not arrive."""
    asked = Drafting(models / "drafter", "full", lookup=True, tree=TreeSize(2, 2, 4), fallback=False)
    llm = coral.load(models / "target", asked)
    assert isinstance(llm.proposer, Merged) and (llm.tree_size, llm.tree_size_origin) == (
        asked.tree,
        "asked for",
    )
    assert type(Drafting(models / "drafter").proposer(llm.target)) is Fallback
    assert type(Drafting().proposer(llm.target)) is Plain
    with pytest.raises(CoralError, match="head and coupled belong into the Drafting"):
        coral.load(llm.target, asked, head="static", coupled=False)
