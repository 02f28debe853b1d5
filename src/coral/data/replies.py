"""What a server that speaks the OpenAI API replies, read within limits: whatever it sends costs at most one
request, never the run, and nothing of it that is secret is told on.
"""

import json
import math
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

LONGEST_RETRY_AFTER = 600.0  # seconds
LARGEST_LIST = 16 << 20  # bytes of a list of models
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
_HEALS = {408, 409, 425, 429}  # and all of 5xx
OF_THE_ENDPOINT = {401, 404}  # no key, no such model: what one request is told is true of all


class FailedError(Exception):
    """A request without an answer: the problem, and whether the same request may succeed later (`heals`)."""

    def __init__(
        self, problem: str, detail: str = "", *, status: int = 0, wait: float = 0.0, lasting: bool = False
    ) -> None:
        super().__init__(problem)
        self.problem, self.detail, self.status, self.wait = problem, detail, status, wait
        self.lasting = lasting

    @property
    def heals(self) -> bool:
        passing = self.status < 300 or self.status >= 500 or self.status in _HEALS | OF_THE_ENDPOINT
        return passing and not self.lasting


@dataclass(frozen=True)
class Reply:
    """A whole reply of at most as many bytes as were allowed."""

    status: int
    headers: Any
    content: bytes


HEADERS = {"Accept-Encoding": "identity"}
"""Of every request: a small packed reply may be a large one."""


async def receive(response: httpx2.Response, most: int) -> Reply:
    """The reply; FailedError where it is packed, or has more than `most` bytes."""
    pieces = _Pieces(response, most)
    async for piece in response.aiter_raw():
        pieces.add(piece)
    return pieces.reply()


def receive_now(response: httpx2.Response, most: int, seconds: float) -> Reply:
    """`receive` without asyncio; it also fails after `seconds`."""
    pieces, begin = _Pieces(response, most), time.monotonic()
    for piece in response.iter_raw():
        pieces.add(piece)
        if time.monotonic() - begin > seconds:
            raise FailedError("sends its reply too slowly")
    return pieces.reply()


class _Pieces:
    def __init__(self, response: httpx2.Response, most: int) -> None:
        self.response, self.most, self.content = response, most, bytearray()
        if (packed := response.headers.get("content-encoding", "identity")) != "identity":
            raise FailedError("the reply is packed, which was not asked for", packed)

    def add(self, piece: bytes) -> None:
        self.content += piece
        if len(self.content) > self.most:
            raise FailedError("the reply is larger than its answer can be", f"{self.most:,} bytes")

    def reply(self) -> Reply:
        return Reply(self.response.status_code, self.response.headers, bytes(self.content))


def read_answer(reply: Reply, max_new_tokens: int) -> tuple[str, bool, int]:
    """What `/chat/completions` answered: the text, whether it is finished, and its tokens; FailedError where
    it holds no answer.
    """
    refuse_error(reply)
    try:
        read = json.loads(reply.content)
        choice = read["choices"][0]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
        text.encode()  # half of a surrogate pair cannot be stored
        counted = int((read.get("usage") or {}).get("completion_tokens") or 0)
    except _BROKEN as error:
        raise FailedError("the reply cannot be read", repr(error)) from error
    tokens = min(max(counted, 0), max_new_tokens)
    if reason not in ("stop", "length"):
        raise FailedError("the answer ended neither at its end nor at its limit", str(reason))
    # A cut may fall inside a character.
    return (text, True, tokens) if reason == "stop" else (text.rstrip("\ufffd"), False, tokens)


def read_models(reply: Reply) -> list[str]:
    """Names of the models in a reply of `/models`; empty if it lists none."""
    if reply.status == 404:
        return []
    refuse_error(reply)
    try:
        return [str(model["id"]) for model in json.loads(reply.content)["data"]]
    except _BROKEN as error:
        raise FailedError("does not speak the OpenAI API (its /models cannot be read)") from error


def refuse_error(reply: Reply) -> None:
    """Raise FailedError for another status than 200."""
    if reply.status == 200:
        return
    hints = {401: " and wants another API key (--api-key-env)", 404: ": no such model or path"}
    raise FailedError(
        f"answers {reply.status}{hints.get(reply.status, '')}",
        _message(reply.content),
        status=reply.status,
        wait=retry_after(reply.headers.get("retry-after", "")),
    )


def _message(content: bytes) -> str:
    """The server's message about an error."""
    try:
        reply = json.loads(content)
        error = reply.get("error", reply)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except _BROKEN:
        return content[:10_000].decode(errors="replace")


def retry_after(given: str) -> float:
    """Seconds of the Retry-After header (a number or a date); 0 without one."""
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(given) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def line(text: str) -> str:
    """Foreign text in one short line, without control characters."""
    clean = "".join(c if c.isprintable() else " " for c in text[:10_000])
    return " ".join(clean.encode(errors="replace").decode().split())[:200]


def redacted(text: str, secret: str | None) -> str:
    """The text with *** in place of the secret; a word such as EMPTY, which stands for no key, is none."""
    return text.replace(secret, "***") if secret and len(secret) >= 8 else text
