"""Verdicts that a gate hangs on: each test names the way in which one could be worth nothing."""

import json
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.errors import CoralError
from coral.json_file import parse
from coral.suites import follow_eval
from coral.suites.follow_eval import DIMENSIONS, LANGUAGES, Check, Item, holds, items, verdict
from coral.suites.prompts import SHIPPED, load

WORDS = st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=8)
HAN = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=1, max_size=12)
TEXTS = st.one_of(st.text(max_size=30), WORDS.map(" ".join), HAN)
CHECKS = st.one_of(
    st.builds(Check, contains_any=WORDS.map(tuple)),
    st.builds(Check, num_words=st.tuples(st.integers(0, 3), st.integers(3, 6))),
    st.builds(Check, han_percent=st.just((50, 100))),
)


def test_a_check_accepts_what_follows_and_refuses_what_does_not() -> None:
    """Stops a check that no answer passes, or any: the gate would compare nothing on that item."""
    assert [item.id for item in items() if not verdict(item, item.passes)] == []
    assert [item.id for item in items() if verdict(item, item.fails)] == []
    assert [item.id for item in items() if verdict(item, "") or verdict(item, " \n")] == []


def test_a_check_forgives_space_around_a_text() -> None:
    """Stops a target that is marked down for how its chat template begins an answer, or for thinking."""
    for item in items():
        assert verdict(item, f" \n{item.passes}\n\n"), item
        assert not verdict(item, f" \n{item.fails}\n\n"), item
        assert verdict(item, f"<think>\n{item.fails}</think>\n\n{item.passes}"), item


def test_a_check_does_not_take_the_question_for_an_answer() -> None:
    """Stops a point for a target that repeats what it is told."""
    assert [item.id for item in items() if verdict(item, item.prompt)] == []


def test_every_dimension_is_there_in_both_languages() -> None:
    """Stops a suite that speaks of five dimensions and two languages and measures one, or one item twice."""
    sorts = Counter((item.dimension, item.language) for item in items())
    assert sorts.keys() == {(dimension, language) for dimension in DIMENSIONS for language in LANGUAGES}
    assert min(sorts.values()) >= 20
    for texts in ([item.id for item in items()], [item.prompt for item in items()]):
        assert len(set(texts)) == len(items()) == SHIPPED[follow_eval.NAME]


def test_prompts_are_in_the_language_that_they_say() -> None:
    """Stops an English prompt that is counted as Chinese."""
    chinese = {item.id for item in items() if re.search(r"[\u4e00-\u9fff]", item.prompt)}
    assert chinese == {item.id for item in items() if item.language == "zh"}


def test_the_first_items_are_of_every_sort() -> None:
    """Stops `--limit 10` from measuring one dimension, and fixtures that reach a target as prompts."""
    few = load(follow_eval.NAME, limit=10)[follow_eval.NAME]
    sorts = {(item.dimension, item.language) for item in items() if item.id in {prompt.id for prompt in few}}
    assert len(sorts) == 10
    assert [prompt.turns for prompt in few] == [(item.prompt,) for item in items()[:10]]


@pytest.mark.parametrize(
    ("check", "why"),
    [
        ({}, "without a predicate"),
        ({"contains": ["a"]}, "contains"),
        ({"matches": "("}, "no regular expression"),
        ({"equals": ["* '"]}, "found in any text"),
        ({"each_line": {}}, "without a predicate"),
        ({"num_words": [1, "2"]}, "num_words"),
    ],
)
def test_an_item_that_cannot_be_judged_is_refused(check: dict[str, Any], why: str) -> None:
    """Stops a misspelt predicate from being a check that anything passes."""
    item = {"id": "1", "dimension": "logic", "language": "en", "prompt": "p", "passes": "a", "fails": "b"}
    with pytest.raises(CoralError, match=why):
        parse(json.dumps({**item, "check": check}).encode(), Item, "line 1", "correct it.")


def test_every_predicate_is_used() -> None:
    """Stops a predicate that no item keeps honest."""

    def names(check: Check) -> set[str]:
        inner = [*filter(None, (check.each_line, *(check.any_of or ())))]
        return {*check.given}.union(*map(names, inner))

    used = set[str]().union(*(names(item.check) for item in items()))
    assert follow_eval.PREDICATES.keys() - used == set()
    assert {*vars(Check(equals=("a",)))} == follow_eval.PREDICATES.keys()


@given(WORDS, st.sampled_from([str, str.upper, str.title, '"{}"'.format, "{}.".format, "**{}**".format]))
def test_equals_forgives_form_only(words: list[str], form: Any) -> None:
    """Stops an answer that is refused for its full stop, and another word that is let through."""
    check = Check(equals=(" ".join(words),))
    assert holds(check, form(" ".join(words)))
    full_width = "".join(chr(ord(letter) + 0xFEE0) for letter in words[0])
    assert holds(Check(equals=(words[0],)), full_width)
    assert not holds(check, " ".join([*words, "more"])) and not holds(check, "x" + " ".join(words))
    assert holds(Check(exactly=(words[0],)), f'"{words[0]}"')
    assert not holds(Check(exactly=(words[0],)), words[0].upper())


@given(WORDS)
def test_counts_are_of_what_they_say(words: list[str]) -> None:
    """Stops a limit of words, sentences or lines that is kept only by chance."""
    n = len(words)
    for text, check in (
        (" ".join(words), Check(num_words=(n, n), num_sentences=(1, 1))),
        (". ".join(words), Check(num_sentences=(n, n))),
        ("。".join(words) + "!", Check(num_sentences=(n, n))),
        ("\n\n".join(words), Check(num_paragraphs=(n, n), num_lines=(n, n))),
        ("\n".join(words), Check(num_paragraphs=(1, 1), num_lines=(n, n))),
        (", ".join(words), Check(num_characters=(len("".join(words)),) * 2)),
    ):
        assert holds(check, text), (check, text)
        assert not holds(check, text + "\n\nand. more") or n == 0


@given(TEXTS, WORDS.map(tuple))
def test_containing_is_one_notion(text: str, parts: tuple[str, ...]) -> None:
    """Stops two predicates that disagree on what a text contains."""
    if text.strip():
        assert holds(Check(contains_none=parts), text) != holds(Check(contains_any=parts), text)
    if holds(Check(ordered=parts), text):
        assert holds(Check(contains_all=parts), text)
    if holds(Check(contains_all=parts), text):
        assert holds(Check(contains_any=parts), text)
    assert holds(Check(ordered=parts), " ".join(parts))
    assert holds(Check(starts_with=parts), parts[-1] + text)
    assert holds(Check(ends_with=parts), f"{text} {parts[-1]}.")


@given(CHECKS, CHECKS, TEXTS)
def test_checks_compose_as_logic_does(one: Check, two: Check, text: str) -> None:
    """Stops a composed check that looks at only one of its parts."""
    both = Check(**{**one.given, **two.given})
    if not one.given.keys() & two.given.keys():
        assert holds(both, text) == (holds(one, text) and holds(two, text))
    assert holds(Check(any_of=(one, two)), text) == (holds(one, text) or holds(two, text))
    lines = [line for line in text.split("\n") if line.strip()]
    assert holds(Check(each_line=one), text) == (bool(lines) and all(holds(one, line) for line in lines))


@given(
    st.recursive(
        st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_json_is_compared_by_value(value: Any) -> None:
    """Stops JSON that is refused for its spaces or code fence, and true taken for 1."""
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=2)):
        assert holds(Check(json_equals=value), text)
        assert holds(Check(json_equals=value), f"```json\n{text}\n```")
    assert not holds(Check(json_equals=[value]), json.dumps(value))
    if isinstance(value, dict):
        assert holds(Check(json_keys=tuple(value)), json.dumps(value))
        assert not holds(Check(json_keys=(*value, "one more than there are")), json.dumps(value))
    assert not holds(Check(json_equals=1), "true")


@given(WORDS.map(" ".join), HAN)
def test_case_and_script(latin: str, han: str) -> None:
    """Stops a text in two languages, or two cases, that passes for one."""
    assert holds(Check(case="upper"), latin.upper()) and holds(Check(case="lower"), latin)
    assert not holds(Check(case="upper"), latin.upper() + "a") and not holds(Check(case="lower"), han)
    assert holds(Check(han_percent=(100, 100)), f"{han}, 1。") and holds(Check(han_percent=(0, 0)), latin)
    assert holds(Check(han_percent=(1, 99)), latin + han)
