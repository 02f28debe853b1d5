"""What is said of a prompt and its model beside the text, and where an answer to chat messages ends."""

from dataclasses import replace
from typing import Any

import pytest
from tiny import tiny_model
from tiny_tokenizer import EOT, PAD, PLAIN, tiny_tokenizer
from transformers import GenerationConfig

from coral.api import LLM
from coral.cli import notes
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.errors import CoralError
from coral.integrations.transformers.generate_options import not_applied
from coral.target.target import Target
from coral.tree import TreeSize

TOKENIZER = tiny_tokenizer()


def pair(**config: Any) -> LLM:
    model = tiny_model(vocab_size=len(TOKENIZER), **config)
    return LLM(Target.load(model, tokenizer=tiny_tokenizer()), Plain(), TreeSize(1, 1, 1))


def test_what_a_generation_config_asks_for_and_is_not_done() -> None:
    """Stops: a penalty of the model's makers that is left out without a word, or a line about nothing."""
    asks = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    penalty = ["repetition_penalty=1.1"]
    sampling = ["temperature=0.7", "top_k=20", "top_p=0.8"]
    assert not_applied(asks.to_dict(), Sampling()) == ["do_sample=True", *sampling, *penalty]
    assert not_applied(asks.to_dict(), Sampling(0.7, 20, 0.8)) == penalty
    assert not_applied(asks.to_dict(), Sampling(0.7, 20, 0.9)) == ["top_p=0.8", *penalty]
    assert not_applied(GenerationConfig().to_dict(), Sampling()) == not_applied({}, Sampling()) == []
    off = GenerationConfig(repetition_penalty=1.0, num_beams=1, temperature=0.5)
    assert not_applied(off.to_dict(), Sampling()) == []
    for name, value in {"min_p": 0.1, "no_repeat_ngram_size": 3, "bad_words_ids": [[1]], "num_beams": 4,
                        "suppress_tokens": [5], "stop_strings": ["x"]}.items():  # fmt: skip
        assert not_applied(GenerationConfig(**{name: value}).to_dict(), Sampling()) == [f"{name}={value!r}"]


def test_notes_are_one_line_each() -> None:
    """Stops: a text with two beginnings, or a control token, that nobody meant."""
    own = pair()
    options = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    assert (
        notes.of_model(own, options)
        == notes.of_prompt(own, "hi", True)
        == notes.of_prompt(own, "hi", False)
        == []
    )
    own.target.facts = replace(own.target.facts, generation={"repetition_penalty": 1.1})
    (line,) = notes.of_model(own, options)
    assert "repetition_penalty=1.1" in line and "\n" not in line
    (line,) = notes.of_prompt(own, "<|bos|>hi", False)
    assert line == "the text begins with <|bos|>, and the tokenizer puts another before it"
    (line,) = notes.of_prompt(own, "what is <|eot|>?", True)
    assert line == "the prompt spells <|eot|>, read as special tokens, not as text"


def test_a_prompt_reads_special_text_as_training_does() -> None:
    """Stops: two policies, one of what is prepared and one of what is generated."""
    from coral.data.chat_format import ChatFormat

    messages = [{"role": "user", "content": "a <|eot|> b"}]
    assert pair().encode(messages) == ChatFormat(TOKENIZER).prompt(messages)


def test_an_answer_ends_where_the_templates_does() -> None:
    """Stops: an answer that runs on behind its end token, since the config names end-of-text alone."""
    own = pair(eos_token_id=PAD)
    own.target.eos_ids = frozenset([PAD])
    asked = [{"role": "user", "content": "hi"}]
    assert own.start("hi").eos_ids == own.start(asked).eos_ids == {PAD, EOT}
    assert own.start("hi", chat=False).eos_ids == own.start([7, 8]).eos_ids == {PAD}
    assert own.start("hi", ignore_eos=True).eos_ids == frozenset()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ({"rag": PLAIN, "tool_use": PLAIN}, "several chat templates"),
        ("{{ messages[0]['content'] + 1 }}", "refuses these messages: TypeError"),
        ("{{ raise_exception('no') }}", "refuses these messages: no; change them"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template: Any, why: str) -> None:
    """Stops: a traceback of jinja at the first prompt."""
    own = pair()
    own.tokenizer.chat_template = template
    with pytest.raises(CoralError, match=why):
        own.encode("hi")
