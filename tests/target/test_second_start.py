"""A second start: the same target from what a first start wrote down."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from tiny_gguf import write_gguf
from tiny_tokenizer import tiny_tokenizer

import coral
from coral.bench.deepen import append_layers
from coral.target import second_start
from coral.target.second_start import Recorded
from coral.target.source import Loaded
from coral.target.target import Target
from coral.tree import DraftTree

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="targets run natively with a C++ compiler")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
QUESTION = [{"role": "user", "content": "What is <|eot|>?"}]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_model("llama", vocab_size=len(tiny_tokenizer()), **SIZES).save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def twice(*source: object, **options: object) -> tuple[Target, Target]:
    """The targets of a first and a second start."""
    first, second = (Target.load(*source, **options).on() for _ in range(2))  # type: ignore[arg-type]
    assert isinstance(first.source, Loaded) and isinstance(second.source, Recorded)
    return first, second


def logits(target: Target) -> torch.Tensor:
    cache = target.new_cache(16)
    states = target.read(cache, [1, 2, 3], (-1,))
    scores, features = target.verify([cache], [DraftTree([4, 5, 6], [-1, 0, 0], [0.0, -1.0, -1.0])])
    return torch.cat([states.flatten(), scores[0].flatten(), features[0].flatten()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_the_same_without_the_model(place: Path, dtype: str) -> None:
    """Stops weights, facts or a tokenizer that differ from those of a first start."""
    first, second = twice(place, dtype=dtype)
    assert torch.equal(logits(first), logits(second)) and not second.source.is_loaded
    assert second.facts == first.facts and second.name == first.name and second.dtype == first.dtype
    options = {"max_new_tokens": 12, "temperature": 0.7, "seed": 3}
    texts = [coral.load(target, None).generate("Hello", **options) for target in (first, second)]
    assert texts[0] == texts[1] and not second.source.is_loaded


def test_blocks_of_a_gguf_file_stay_packed(tmp_path: Path) -> None:
    """Stops rows of heads in the file's order, and a record of one dtype for another."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", **SIZES), quantised="Q8_0")
    for dtype in ("packed", "bfloat16"):
        first, second = twice(path, dtype=dtype)
        assert torch.equal(logits(first), logits(second)) and second.precision == dtype


def test_whatever_else_is_asked_of_it_loads_the_model(place: Path) -> None:
    """Stops an answer from a stand-in that is another one than the model's."""
    first, second = twice(place)
    assert second.config.to_dict() == first.config.to_dict() and second.source.is_loaded
    slow = second.on("transformers")
    assert (logits(slow) - logits(first)).abs().max() < 1e-4
    assert second.model.get_input_embeddings().weight is second.embedding_weight
    second.model.resize_token_embeddings(len(tiny_tokenizer()) + 8)
    assert second.is_stale


def test_a_changed_directory_is_read_anew(place: Path) -> None:
    """Stops a text by weights, ends or a template that are no longer there."""
    _, second = twice(place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    changed = Target.load(place)
    assert isinstance(changed.source, Loaded) and changed.eos_ids == {7} != second.eos_ids
    changed.on()
    assert Target.load(place).eos_ids == {7}
    (place / "chat_template.jinja").write_text("{{ 'other' }}")
    assert isinstance(Target.load(place).source, Loaded)


def test_a_model_that_is_changed_is_not_what_was_written_down(place: Path) -> None:
    """Stops layers that were appended, for a bench, from standing in the record of the directory."""
    target = Target.load(place)
    append_layers(target, 4)
    assert target.on("native").new_cache(8).layers[3:]
    again = Target.load(place).on()
    assert isinstance(again.source, Recorded) and again.facts.num_layers == 2
    assert logits(again).isfinite().all()


def test_a_damaged_record_is_made_anew(place: Path) -> None:
    """Stops a start that fails for what it need not have."""
    first, _ = twice(place)
    ids = first.tokenizer("Hello").input_ids
    for record in second_start._root().glob("*/record.json"):
        record.write_text('{"facts":')
    assert isinstance(Target.load(place).source, Loaded)
    for tokens in second_start._root().glob("*/tokenizer.json"):
        tokens.write_text("{")
    again = Target.load(place)
    assert isinstance(again.source, Recorded) and again.tokenizer("Hello").input_ids == ids


@given(text=st.text(max_size=40), special=st.booleans())
@settings(max_examples=60, deadline=None)
def test_its_tokenizer_is_the_whole_one(written: tuple[object, object], text: str, special: bool) -> None:
    """Stops ids or text that differ by what a class of transformers does beside its tokens."""
    whole, recorded = written
    ids = whole(text, add_special_tokens=special).input_ids
    assert recorded(text, add_special_tokens=special).input_ids == ids
    for skip in (False, True):
        assert recorded.decode(ids, skip_special_tokens=skip) == whole.decode(ids, skip_special_tokens=skip)
    messages = [{"role": "user", "content": text}]
    for options in ({"tokenize": False}, {"add_generation_prompt": True}, {"return_dict": False}):
        rendered = [each.apply_chat_template(messages, **options) for each in (whole, recorded)]
        assert rendered[0] == rendered[1] or dict(rendered[0])["input_ids"] == rendered[1].input_ids


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, object]:
    place = tmp_path_factory.mktemp("tokenizer")
    tiny_model("llama", vocab_size=len(tiny_tokenizer()), **SIZES).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    first, second = twice(place)
    return first.tokenizer, second.tokenizer


def test_its_tokenizer_answers_as_the_whole_one(written: tuple[object, object]) -> None:
    """Stops ends of turns, special tokens or names that are not the tokenizer's."""
    whole, recorded = written
    for name in (
        "chat_template",
        "all_special_ids",
        "name_or_path",
        "bos_token",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(recorded, name) == getattr(whole, name)
    assert len(recorded) == len(whole) and recorded.get_vocab() == whole.get_vocab()
    ids = [*range(len(whole))]
    tokens = whole.convert_ids_to_tokens(ids)
    assert recorded.convert_ids_to_tokens(ids) == tokens
    assert [recorded.convert_tokens_to_ids(token) for token in tokens] == ids
    special = {i for i, token in recorded.added_tokens_decoder.items() if token.special}
    assert special == {i for i, token in whole.added_tokens_decoder.items() if token.special}


@pytest.mark.slow
def test_nothing_heavy_is_imported(place: Path, tmp_path: Path) -> None:
    """Stops the seconds that transformers and torch's compiler take to import before a first token."""
    program = (
        "import sys, coral\n"
        f"llm = coral.load({str(place)!r})\n"
        "llm.generate('Hello', max_new_tokens=3)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'transformers', 'gguf', 'sympy'}))\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    compiled = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coral" / "compiled"
    (tmp_path / "cache" / "coral").mkdir(parents=True)
    if compiled.is_dir():  # a minute of building less
        shutil.copytree(compiled, tmp_path / "cache" / "coral" / "compiled")

    said = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert said[1].strip() == "[]", said
