"""What single tokens say, for answers that list them."""

from __future__ import annotations

import re
from functools import cache, cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's tokens of a single byte


class Names:
    """A token's text as it is behind another one, so that a space in front stays; special tokens show."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._known = tokenizer, dict[int, str]()

    def __call__(self, token: int) -> str:
        if token not in self._known:
            before, both = self._decode(self._anchor), self._decode([*self._anchor, token])
            self._known[token] = both[len(before) :] if both.startswith(before) else self._decode([token])
        return self._known[token]

    def bytes(self, token: int) -> list[int] | None:
        """The bytes that a token stands for; None where its tokenizer does not tell, of half a character."""
        name = self(token)
        if "\ufffd" not in name:
            return [*name.encode()]
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if found := _BYTE.fullmatch(piece):
            return [int(found[1], 16)]
        known = _byte_of()
        return [known[c] for c in piece] if known.keys() >= {*piece} else None

    def unique(self, token: int) -> str:
        """The text, or of half a character OpenAI's "bytes:\\xe2", which is no other token's."""
        if "\ufffd" in self(token) and (found := self.bytes(token)):
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
        return self(token)

    @cached_property
    def _anchor(self) -> list[int]:
        return [int(i) for i in self._tokenizer("a", add_special_tokens=False).input_ids][-1:]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each letter of a byte-level token stands for (GPT-2's table)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
