"""Whatever people hand in as a prompt is read, or called what it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BatchEncoding

from coral.api import LLM, load
from coral.decoding import prompt_forms
from coral.errors import CoralError


@pytest.fixture(scope="module")
def pair(models: Path) -> LLM:
    return load(models / "target", dtype=None, attention=None, head=None, backend="transformers")


def test_ids_in_every_form(pair: LLM, models: Path) -> None:
    """Stops an UndefinedError of a template that was given a tensor for messages."""
    ids = pair.encode("hi there")
    wanted = pair.generate(ids, max_new_tokens=6)
    tokenizer = AutoTokenizer.from_pretrained(models / "target")
    said = [{"role": "user", "content": "hi there"}]
    encoded = tokenizer.apply_chat_template(
        said, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert isinstance(encoded, BatchEncoding)
    padded = {"input_ids": [0, 0, *ids], "attention_mask": [0, 0, *[1] * len(ids)]}
    forms = [torch.tensor(ids), torch.tensor([ids]), np.array(ids), np.array([ids]), list(np.array(ids))]
    nested: Any = ids
    for _ in range(2000):  # deeper than Python calls itself
        nested = [nested]
    for form in [*forms, tuple(ids), [ids], [torch.tensor(ids)], nested, encoded, padded]:
        assert pair.encode(form) == ids and pair.generate(form, max_new_tokens=6) == wanted


@pytest.mark.parametrize(
    "prompt, message",
    [
        (None, "the prompt is NoneType; give a text"),
        (b"bytes", "the prompt is bytes; give a text"),
        (3, "the prompt is int; give a text"),
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([[]], "the prompt is empty"),
        (torch.tensor(4), "the prompt is Tensor; give"),
        (torch.tensor([1.5]), "holds 1.5, which is neither"),
        ([[1], [2]], "is a batch of 2; give one at a time"),
        (["one", "two"], "holds 'one', which is neither"),
        ([1, "two"], "holds 'two', which is neither"),
        ([True], "holds True, which is neither"),
        ([{"role": "user"}], "a chat message holds role; give it a role and a content"),
        ([{"content": "x"}], "a chat message holds content; give it"),
        ("caf\udce9", "is no readable text: its character 4 is half of one, or a byte that is no UTF-8"),
        ([{"role": "user", "content": "\ud800"}], "a chat message is no readable text"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, "the attention_mask is none of the input_ids"),
        ({"input_ids": [1, 2], "attention_mask": 1}, "the attention_mask is none of the input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "the prompt is empty"),
    ],
)
def test_what_is_no_prompt_is_called_what_it_is(pair: LLM, prompt: Any, message: str) -> None:
    """Stops tracebacks of templates and tokenizers."""
    with pytest.raises(CoralError, match=message):
        pair.stream(prompt, max_new_tokens=1)


def test_several_prompts_are_answered_as_each_alone(pair: LLM) -> None:
    """Stops answers that change places, or that depend on their neighbours."""
    asked, options = ["hi", "the the the", "ask 1"], {"max_new_tokens": 9, "temperature": 1.0, "seed": 3}
    alone = [pair.generate(each, sequence_id=i, **options) for i, each in enumerate(asked)]
    assert (
        pair.generate(asked, **options) == alone and pair.generate(tuple(asked[:1]), **options) == alone[:1]
    )


def test_none_is_the_default(pair: LLM) -> None:
    """Stops a TypeError for options that a caller passes on unset."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    assert pair.generate("hi", **dict.fromkeys(names)) == pair.generate("hi")
    with pytest.raises(CoralError, match=r"max_new_tokens is 2\.5, but it must be a whole number"):
        pair.generate("hi", max_new_tokens=2.5)
    with pytest.raises(CoralError, match=r"sequence_id is 1\.5, but it must be a whole number"):
        pair.generate("hi", sequence_id=1.5, temperature=1.0)
    with pytest.raises(CoralError, match="stop is 3; give a string"):
        pair.generate("hi", stop=3)
    for temperature in (-1, 10**400):
        with pytest.raises(CoralError, match="temperature is"):
            pair.generate("hi", temperature=temperature)
    with pytest.raises(CoralError, match="a stop string is no readable text"):
        pair.generate("hi", stop="\udcff")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_a_dtype_of_torch(models: Path, dtype: Any) -> None:
    """Stops a refusal of what every other library takes."""
    assert load(models / "target", dtype=dtype, backend="transformers").target.dtype == torch.bfloat16


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
ANY = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "input_ids", "x"]), inner)
    ),
    max_leaves=6,
)  # fmt: skip


@given(ANY)
def test_nothing_else_is_raised(prompt: Any) -> None:
    """Stops what nobody thought of."""
    try:
        read = prompt_forms.read(prompt)
    except CoralError:
        return
    assert read and (isinstance(read, str) or all(isinstance(each, int | dict) for each in read))


def test_a_dash_in_front_and_bytes_that_are_no_text(coral: Any, models: Path) -> None:
    """Stops "no such option: -5" for "-5 + 3 = ?", and a traceback of the tokenizer."""
    result = coral("generate", "--target", models / "target", "-5 + 3 = ?")
    assert result.code == 2 and "write -- before a prompt that begins with a dash" in result.err
    assert "write -- before" in coral("generate", "-hello").err  # no option of ours has one dash
    result = coral("generate", "--target", models / "target", "--max-new-tokens", 2, "--", "-5 + 3 = ?")
    assert result.code == 0
    result = coral("generate", "--target", models / "target", "caf\udce9")
    assert result.code == 2 and "the prompt is no readable text" in result.err and result.out == ""
