"""From tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from coral.decoding.prompt_forms import readable
from coral.errors import CoralError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stop = str | Sequence[str] | None
"""Stop strings: one, several, or none."""


class Detokenizer:
    """Turns tokens into text as they come; the pieces join to the text of all tokens.

    A piece is held back while it ends in an incomplete character. Special tokens are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start, self.shown = 0, 0  # text of tokens[start:shown] is known context, of [shown:] is new

    def push(self, token: int) -> str:
        self.tokens.append(token)
        before = self._decode(self.tokens[self.start : self.shown])
        now = self._decode(self.tokens[self.start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self.start, self.shown = self.shown, len(self.tokens)
        return now[len(before) :]

    def rest(self) -> str:
        """What was held back when no more tokens come."""
        before = self._decode(self.tokens[self.start : self.shown])
        return self._decode(self.tokens[self.start :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def stop_strings(stop: Stop) -> tuple[str, ...]:
    """The stop strings that `stop` names; a string is one of them, and not a sequence of its letters.

    Raises:
        CoralError: one is empty, or no string.
    """
    if stop is not None and not isinstance(stop, list | tuple | str | set | frozenset):
        raise CoralError(f"stop is {stop!r}; give a string, or several in a list.")
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for string in strings:
        if not isinstance(string, str):
            raise CoralError(f"a stop string is {string!r}; give a string, or several in a list.")
        if not string:
            raise CoralError("a stop string is empty; leave it out, or write the text to stop before.")
        readable(string, "a stop string")
    return strings


def stop_at(tokenizer: PreTrainedTokenizerBase, stop: Stop) -> Callable[[list[int]], bool] | None:
    """Whether a text ends because its newest token completed one of the stop strings; None without any."""
    strings = stop_strings(stop)
    if not strings:
        return None
    window = max(len(s.encode()) for s in strings) + 8  # enough: a token holds at least a byte

    def ends(written: list[int]) -> bool:
        text = tokenizer.decode(
            written[-window:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return any(string in text for string in strings)

    return ends


def cut_at(text: str, stop: Stop) -> str:
    """The text before the first stop string."""
    return text[: min((i for s in stop_strings(stop) if (i := text.find(s)) >= 0), default=len(text))]
