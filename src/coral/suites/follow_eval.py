"""Instruction following, judged by rules: instructions in English and Chinese, each with a check of answers.

The design is FollowEval's (arXiv 2311.09829): five dimensions, two languages, instructions written by hand,
answers that a rule can judge. The items are ours. A check forgives what no instruction is about (spaces
around the text, quotes and a full stop, full-width forms) and nothing else.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from coral.json_file import STRICT, Count, parse

NAME = "follow_eval"
DIMENSIONS = ("string", "commonsense", "logic", "space", "constraints")
LANGUAGES = ("en", "zh")

Strings = tuple[str, ...]
Bounds = tuple[Count, Count]
"""Least and most, both included."""


@dataclass(frozen=True)
class Check:
    """What a text must be: every predicate that is given holds; `PREDICATES` says what each means."""

    __pydantic_config__ = STRICT
    equals: Strings | None = None
    exactly: Strings | None = None
    contains_all: Strings | None = None
    contains_any: Strings | None = None
    contains_none: Strings | None = None
    ordered: Strings | None = None
    starts_with: Strings | None = None
    ends_with: Strings | None = None
    matches: str | None = None
    finds: Strings | None = None
    lacks: Strings | None = None
    counts: dict[str, Bounds] | None = None
    num_words: Bounds | None = None
    num_characters: Bounds | None = None
    num_sentences: Bounds | None = None
    num_lines: Bounds | None = None
    num_paragraphs: Bounds | None = None
    case: Literal["upper", "lower"] | None = None
    han_percent: Bounds | None = None
    json_keys: Strings | None = None
    json_equals: Any = None
    each_line: Check | None = None
    any_of: tuple[Check, ...] | None = None

    def __post_init__(self) -> None:
        if not self.given:
            raise ValueError("a check without a predicate holds for any text")
        for pattern in (self.matches or "", *(self.finds or ()), *(self.lacks or ())):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        sought = (self.contains_all, self.contains_any, self.contains_none, self.ordered)
        words = [_fold(word) for options in sought for word in options or ()]
        words += [_bare(_fold(word)) for word in self.equals or ()]
        if not all(words):
            raise ValueError("a string of nothing but spaces or quotes is found in any text")

    @property
    def given(self) -> dict[str, Any]:
        """The predicates of this check with what they are given."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Item:
    """One instruction. passes, fails: a text that the check accepts, and a likely one that it must not."""

    __pydantic_config__ = STRICT
    id: str
    dimension: Literal["string", "commonsense", "logic", "space", "constraints"]
    language: Literal["en", "zh"]
    prompt: str
    check: Check
    passes: str
    fails: str


@cache
def items() -> tuple[Item, ...]:
    """All items; dimensions and languages take turns, so that the first few are of every sort.

    Raises:
        CoralError: the package's file is damaged.
    """
    text = files("coral.suites").joinpath("data", f"{NAME}.jsonl").read_text(encoding="utf-8")
    lines = [line.encode() for line in text.split("\n") if line]
    advice = "install the package again."
    return tuple(
        parse(line, Item, f"{NAME}.jsonl line {number}", advice) for number, line in enumerate(lines, 1)
    )


def verdict(item: Item, text: str) -> bool:
    """Whether the text, behind what the target thought, does what the item's instruction asks."""
    return holds(item.check, text.rpartition("</think>")[2])


def holds(check: Check, text: str) -> bool:
    """Whether every predicate of the check holds."""
    return all(PREDICATES[name](text.strip(), value) for name, value in check.given.items())


_ONE_FORM = str.maketrans("“”「」『』\u2018\u2019、", '""""""\'\',')


def _form(text: str) -> str:
    """One form of each character: full-width ones become ASCII, curly quotes straight."""
    return unicodedata.normalize("NFKC", text.translate(_ONE_FORM))


def _fold(text: str) -> str:
    """One form and no case."""
    return _form(text).casefold().strip()


def _bare(text: str) -> str:
    """Without the quotes, emphasis and full stop that may stand around an answer."""
    around = " \n\t\"'`*"
    return text.strip(around).rstrip(".。").strip(around)


def _joined(text: str) -> str:
    """Spaces as one, and none around the marks of a list."""
    return re.sub(r"\s*([,:;])\s*", r"\1", " ".join(text.split()))


def equals(text: str, options: Strings) -> bool:
    """The text is one of these, whatever its case and spacing."""
    return _joined(_bare(_fold(text))) in {_joined(_bare(_fold(option))) for option in options}


def exactly(text: str, options: Strings) -> bool:
    """The text is one of these, letter for letter."""
    return any(_form(option) in (_form(text), _bare(_form(text))) for option in options)


def contains_all(text: str, parts: Strings) -> bool:
    """Each of these occurs, in any case."""
    return all(_fold(part) in _fold(text) for part in parts)


def contains_any(text: str, parts: Strings) -> bool:
    """One of these occurs, in any case."""
    return any(_fold(part) in _fold(text) for part in parts)


def contains_none(text: str, parts: Strings) -> bool:
    """None of these occurs, in any case, and the text is not empty."""
    return bool(text) and not contains_any(text, parts)


def ordered(text: str, parts: Strings) -> bool:
    """These occur one behind the other, in any case."""
    at, folded = 0, _fold(text)
    for part in map(_fold, parts):
        found = folded.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def starts_with(text: str, options: Strings) -> bool:
    """The text begins with one of these, in any case."""
    return _fold(text).startswith(tuple(map(_fold, options)))


def ends_with(text: str, options: Strings) -> bool:
    """The text ends with one of these, in any case, but for quotes and a full stop."""
    ends = tuple(map(_fold, options))
    return _fold(text).endswith(ends) or _bare(_fold(text)).endswith(ends)


def matches(text: str, pattern: str) -> bool:
    """The whole text is as the regular expression says."""
    return re.fullmatch(pattern, _form(text)) is not None


def finds(text: str, patterns: Strings) -> bool:
    """Each regular expression is found somewhere."""
    return all(re.search(pattern, _form(text)) for pattern in patterns)


def lacks(text: str, patterns: Strings) -> bool:
    """No regular expression is found, and the text is not empty."""
    return bool(text) and not any(re.search(pattern, _form(text)) for pattern in patterns)


def counts(text: str, wanted: Mapping[str, Bounds]) -> bool:
    """Each of these occurs so many times, in this case."""
    return all(_within(_form(text).count(_form(part)), bounds) for part, bounds in wanted.items())


def num_words(text: str, bounds: Bounds) -> bool:
    """So many words, a hyphen or apostrophe being part of one."""
    return _within(len(re.findall(r"\w+(?:['-]\w+)*", _form(text))), bounds)


def num_characters(text: str, bounds: Bounds) -> bool:
    """So many letters, Chinese characters and digits: spaces and punctuation are not counted."""
    return _within(sum(unicodedata.category(character)[0] in "LN" for character in text), bounds)


def num_sentences(text: str, bounds: Bounds) -> bool:
    """So many sentences; the last one needs no mark at its end."""
    parts = re.split(r"[。!?]+|\.+(?=\W|$)", _form(text))
    return _within(sum(bool(re.search(r"\w", part)) for part in parts), bounds)


def num_lines(text: str, bounds: Bounds) -> bool:
    """So many lines that are not empty."""
    return _within(len(_lines(text)), bounds)


def num_paragraphs(text: str, bounds: Bounds) -> bool:
    """So many parts between empty lines."""
    return _within(len([part for part in re.split(r"\n\s*\n", text) if part.strip()]), bounds)


def case(text: str, wanted: str) -> bool:
    """There are letters, and all that have a case have this one."""
    return text.isupper() if wanted == "upper" else text.islower()


def han_percent(text: str, bounds: Bounds) -> bool:
    """So many percent of the letters are Chinese characters; a text without letters has none."""
    letters = [character for character in text if unicodedata.category(character)[0] == "L"]
    han = sum("\u3400" <= letter <= "\u9fff" for letter in letters)
    return _within(100 * han / max(len(letters), 1), bounds)


def json_keys(text: str, keys: Strings) -> bool:
    """The text is a JSON object with these keys and no other; a code fence may stand around it."""
    value = _json(text)
    return isinstance(value, dict) and value.keys() == set(keys)


def json_equals(text: str, wanted: Any) -> bool:
    """The text is this JSON value; a code fence may stand around it."""
    return json.dumps(_json(text), sort_keys=True) == json.dumps(wanted, sort_keys=True)


def each_line(text: str, check: Check) -> bool:
    """There are lines, and the check holds for each that is not empty."""
    lines = _lines(text)
    return bool(lines) and all(holds(check, line) for line in lines)


def any_of(text: str, checks: Sequence[Check]) -> bool:
    """One of the checks holds."""
    return any(holds(check, text) for check in checks)


def _within(number: float, bounds: Bounds) -> bool:
    return bounds[0] <= number <= bounds[1]


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _json(text: str) -> Any:
    """The JSON value that is the text, or None."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None


PREDICATES: dict[str, Callable[[str, Any], bool]] = {
    each.__name__: each
    for each in (
        equals, exactly, contains_all, contains_any, contains_none, ordered, starts_with, ends_with, matches,
        finds, lacks, counts, num_words, num_characters, num_sentences, num_lines, num_paragraphs, case,
        han_percent, json_keys, json_equals, each_line, any_of,
    )
}  # fmt: skip
