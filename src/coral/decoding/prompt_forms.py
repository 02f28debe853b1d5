"""What people give as a prompt -> a text, token ids or chat messages; anything else is called what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from coral.errors import CoralError

Prompt = str | Sequence[int] | Sequence[dict[str, str]]

_EMPTY = "the prompt is empty; write something to answer or to go on with."


def read(prompt: Any) -> str | list[int] | list[dict[str, str]]:
    """A prompt in one of three plain forms.

    Args:
        prompt: text, chat messages, or token ids: a list, a tensor, an array, or what a tokenizer returns,
            each perhaps as the one row of a batch.

    Raises:
        CoralError: an empty prompt, one that is none of these, several at once, or text with bytes in it that
            are no UTF-8.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise CoralError(_EMPTY)
        return readable(prompt, "the prompt")
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        ids: Any = read(prompt["input_ids"])
        mask = _row(prompt.get("attention_mask"))
        if mask is None or isinstance(ids, str):
            return ids
        if not isinstance(mask, list) or len(mask) != len(ids):
            raise CoralError("the attention_mask is none of the input_ids: give a number for each, or none.")
        return read([each for each, seen in zip(ids, mask, strict=True) if seen])
    listed = _row(prompt)
    if not isinstance(listed, list):
        raise CoralError(
            f"the prompt is {type(prompt).__name__}; give a text, chat messages, or the token ids of one "
            "prompt."
        )
    if not listed:
        raise CoralError(_EMPTY)
    if all(isinstance(each, Mapping) for each in listed):
        return [_message(each) for each in listed]
    if all(_is_id(each) for each in listed):
        return [int(each) for each in listed]
    rows = [row for each in listed if isinstance(row := _listed(each), list)]
    if len(rows) == len(listed) > 1:
        raise CoralError(f"the prompt is a batch of {len(rows)}; give one at a time.")
    odd = next(each for each in listed if not _is_id(each))
    raise CoralError(
        f"the prompt holds {odd!r:.60}, which is neither a token id nor a chat message; give a text, chat "
        "messages with a role and a content, or the token ids of one prompt."
    )


def readable(text: str, what: str) -> str:
    """The text itself; raises CoralError where it holds halves of characters, as Python reads bytes that are
    no UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CoralError(
            f"{what} is no readable text: its character {error.start + 1} is half of one, or a byte that is "
            "no UTF-8; write it in UTF-8."
        ) from None
    return text


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    message = dict(given)
    if not isinstance(message.get("role"), str) or "content" not in message:
        keys = ", ".join(map(str, message)) or "nothing"
        raise CoralError(f"a chat message holds {keys}; give it a role and a content.")
    for part in (message["role"], message["content"]):
        if isinstance(part, str):
            readable(part, "a chat message")
    return message


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _row(value: Any) -> Any:
    """As `_listed`, and the one row of a batch without the lists around it."""
    value = _listed(value)
    while isinstance(value, list) and len(value) == 1 and isinstance(row := _listed(value[0]), list):
        value = row
    return value


def _listed(value: Any) -> Any:
    """Tensors, arrays and other sequences as lists; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value
