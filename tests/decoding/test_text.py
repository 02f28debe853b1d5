"""From tokens to text: nothing lost, nothing torn, and an end where it was asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Oracle, Wrong, prompt_of, tiny_model
from tiny_tokenizer import SPECIALS, tiny_tokenizer

from coral.api import LLM
from coral.decoding.plain import Plain
from coral.decoding.text import Detokenizer, cut_at, stop_at, stop_strings
from coral.errors import CoralError
from coral.target.target import Target
from coral.tree import TreeSize

TOKENIZER = tiny_tokenizer()


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def pieces_of(tokens):
    detokenizer = Detokenizer(TOKENIZER)
    return [detokenizer.push(token) for token in tokens], detokenizer.rest()


@pytest.mark.parametrize(
    "text", ["plain words, then the end", "naïve café", "日本語のテキスト", "a🙂b👩‍👩‍👧c", "é̂\n\n x", ""]
)
def test_pieces_join_to_the_text(text):
    """Stops a character of several tokens that is shown torn, twice or never."""
    pieces, rest = pieces_of(encode(text))
    assert "".join(pieces) == text and rest == ""
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=25))
@settings(deadline=None, derandomize=True, max_examples=80)
def test_pieces_of_any_tokens_join(tokens):
    """Stops bytes that are no character from swallowing or repeating what stands beside them."""
    pieces, rest = pieces_of(tokens)
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) + rest == whole


def test_torn_character_at_the_end_is_kept_back():
    """Stops a replacement character on the screen which the next token would have completed."""
    tokens = encode("ab🙂")
    pieces, rest = pieces_of(tokens[:-1])
    assert "".join(pieces) == "ab" and rest == "\ufffd"


def test_special_tokens_are_left_out():
    """Stops an end-of-turn marker in the answer."""
    eot = SPECIALS.index("<|eot|>")
    pieces, rest = pieces_of([eot, *encode("a"), eot, *encode("b"), eot])
    assert "".join(pieces) + rest == "ab"


@pytest.mark.parametrize(
    ("stop", "before", "after"),
    [
        (["the"], "in ", " end"),
        (["\n\n"], "a line\n", "more"),
        (["END", "x"], "some wE", "END"),
        (["日本"], "語", "日"),
        (["🙂🙂🙂🙂🙂"], "🙂🙂 then ", "🙂"),
        (["👩‍👩‍👧‍👦"], "👩‍👩 and ", "!"),
    ],
    ids=["merged", "newlines", "two", "three bytes", "four bytes", "joined"],
)
def test_stops_at_the_token_that_completes_the_string(stop, before, after):
    """Stops text that goes on because the string is spread over more tokens than are looked at."""
    tokens = encode(before + stop[0] + after)
    ends = stop_at(TOKENIZER, stop)
    first = next(n for n in range(1, len(tokens) + 1) if stop[0] in TOKENIZER.decode(tokens[:n]))
    end = next(n for n in range(1, len(tokens) + 1) if ends(tokens[:n]))
    text = TOKENIZER.decode(tokens[:end])
    assert end <= first and any(string in text for string in stop)
    assert not any(string in TOKENIZER.decode(tokens[: end - 1]) for string in stop)


def test_a_string_alone_is_one_stop_string():
    """Stops stop="zebra" from ending the text at any z, e, b, r or a."""
    for stop in ("zebra", ["zebra"], ("zebra",)):
        assert stop_strings(stop) == ("zebra",) and cut_at("a zebra", stop) == "a "
        ends = stop_at(TOKENIZER, stop)
        assert not ends(encode("a bear")) and ends(encode("a zebra"))
    assert stop_strings(None) == stop_strings("x"[:0] or None) == stop_strings([]) == ()
    for wrong, why in (("", "is empty"), (["a", ""], "is empty"), ([3], "is 3; give a string")):
        with pytest.raises(CoralError, match=why):
            stop_strings(wrong)


def test_no_stop_strings():
    """Stops a check for nothing, which would end every text or slow each cycle."""
    assert stop_at(TOKENIZER, []) is None
    assert cut_at("abc", []) == "abc"


@pytest.mark.parametrize(
    ("strings", "left"),
    [(["c"], "ab"), (["d", "bc"], "a"), (["z"], "abcd"), (["abcd"], ""), (["cd", "c"], "ab")],
)
def test_cut_before_the_first_stop_string(strings, left):
    """Stops a cut at the first string of the list instead of the first in the text."""
    assert cut_at("abcd", strings) == left


def test_generated_text_ends_before_the_stop_string():
    """Stops a stop string inside an accepted path from being overrun, or from being cut away too early."""
    torch.manual_seed(0)
    model = tiny_model(vocab_size=len(TOKENIZER))
    target = Target.load(model, tokenizer=TOKENIZER)
    prompt, tree_size = prompt_of(5, len(TOKENIZER)), TreeSize(top_k=2, max_depth=4, num_nodes=8)
    options = {"max_new_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    state = (pair := LLM(target, Plain(), tree_size)).start(prompt, **options)
    list(pair.cycles(state))
    text = pair.generate(prompt, **options)
    stops = sorted({text[i : i + 2] for i in range(2, len(text) - 2, 3)} - {text[:2]})
    assert len(stops) > 2
    for stop in stops:
        for proposer in (
            Plain(),
            Oracle([state.tokens], len(TOKENIZER)),
            Wrong([state.tokens], len(TOKENIZER)),
        ):
            for asked in (stop, [stop]):
                written = LLM(target, proposer, tree_size).generate(prompt, stop=asked, **options)
                assert written == text[: text.index(stop)]
