"""One answer as it comes: its text in pieces, and the dicts of OpenAI's protocol around them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from coral.decoding.text import Detokenizer, cut_at
from coral.serving.token_names import Names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from coral.decoding.log_probs import Scored
    from coral.decoding.state import Cycle
    from coral.serving.openai import Asked

_LEAST = -9999.0
"""What stands for a log-probability that JSON has no number for, as in vLLM."""


@dataclass(frozen=True)
class Piece:
    """What a cycle adds to a text.

    drafted: for each character whether it comes from an accepted draft token.
    scored: where each of the cycle's tokens begins in the text, of which some may show in a later piece, and
    its log-probability; of a prompt's first, which has none, the id alone.
    finish: why the text ends with this piece; "": it goes on.
    """

    text: str
    drafted: Sequence[bool] = ()
    scored: Sequence[tuple[int, Scored | int]] = ()
    finish: str = ""

    @property
    def spans(self) -> list[dict[str, Any]]:
        """The text, cut where it changes between accepted draft tokens and the target's own."""
        runs = groupby(zip(self.text, self.drafted, strict=True), key=lambda each: each[1])
        return [{"text": "".join(c for c, _ in run), "accepted": drafted} for drafted, run in runs]


class Text:
    """One answer as it comes: pieces join to the text in front of the first stop string.

    Held back is what may become a stop string, or is half of a character.

    Args:
        least: tokens among which no stop string is looked for.
        echo: what stands in front of the answer, and so of the first piece.

    Attributes:
        tokens, cycles: how many were written. finish: why it ended, "stop" or "length"; "": it goes on.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], least: int = 0, echo: str = ""
    ) -> None:
        self.stop, self.least, self.tokens, self.cycles, self.finish = stop, least, 0, 0, ""
        self.drafts, self.drafted, self.accepted = 0, 0, 0
        self._tokenizer, self._detokenizer, self._ended = tokenizer, Detokenizer(tokenizer), False
        self._echo, self._length = echo, len(echo)
        self._held, self._marks, self._free = "", list[bool](), 0  # characters that no stop string may take

    def opening(self, prompt: Sequence[int], scored: Sequence[Scored] | None) -> Piece:
        """The prompt, where it is to be repeated; scored: its tokens but the first; None: none are wanted."""
        words, place = Detokenizer(self._tokenizer), 0
        places: list[tuple[int, Scored | int]] = []
        listed: list[Scored | int] = [] if scored is None else [prompt[0], *scored]
        for token, its in zip(prompt, listed, strict=False):
            places.append((place, its))
            place += len(words.push(token))
        return Piece(self._echo, [False] * len(self._echo), places)

    def push(self, cycle: Cycle, finish: str = "", scored: Sequence[Scored] = ()) -> Piece:
        """The next piece; `finish` says why the text ends with this cycle."""
        self.drafts, self.cycles = self.drafts + (cycle.num_drafted > 0), self.cycles + 1
        self.drafted, self.accepted = self.drafted + cycle.num_drafted, self.accepted + cycle.num_accepted
        self.finish = finish
        places = [self._add(token, i < cycle.num_accepted) for i, token in enumerate(cycle.tokens)]
        if finish:
            self._hold(self._detokenizer.rest(), False)
        shown = self._cut()
        text, marks = self._held[:shown], self._marks[:shown]
        self._held, self._marks, self._free = (
            self._held[shown:],
            self._marks[shown:],
            max(0, self._free - shown),
        )
        return Piece(text, marks, [*zip(places, scored, strict=True)] if scored else (), finish)

    def _add(self, token: int, drafted: bool) -> int:
        """Where the token begins in the text, which it is then part of."""
        place = self._length
        self._hold(self._detokenizer.push(token), drafted)
        self.tokens += 1
        if self.tokens <= self.least:
            self._free = len(self._held)
        return place

    def _hold(self, said: str, drafted: bool) -> None:
        self._length += len(said)
        if not self._ended:
            self._held, self._marks = self._held + said, self._marks + [drafted] * len(said)

    def _cut(self) -> int:
        """How many of the held characters can be shown."""
        if self._ended:
            return 0
        held = self._held[self._free :]
        piece = cut_at(held, self.stop)
        self._ended = len(piece) < len(held)
        if not (self._ended or self.finish):
            piece = piece[: len(piece) - _begun(piece, self.stop)]
        return self._free + len(piece)


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many of the last characters are how a stop string begins."""
    longest = max(map(len, stop), default=1) - 1
    ends = (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stop))
    return next(ends, 0)


class Answer:
    """The dicts of one answer.

    Args:
        prompt_tokens: of all prompts.
    """

    def __init__(
        self, asked: Asked, model: str, prompt_tokens: int, texts: Sequence[Text], names: Names
    ) -> None:
        self.asked, self.prompt_tokens, self.texts, self._names = asked, prompt_tokens, texts, names
        name = "chatcmpl" if asked.chat else "cmpl"
        self._head = {"id": f"{name}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._whole = "chat.completion" if asked.chat else "text_completion"
        self._chunk = "chat.completion.chunk" if asked.chat else "text_completion"

    def whole(self, said: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """All of it: of each choice its pieces."""
        choices = []
        for index, (text, pieces) in enumerate(zip(self.texts, said, strict=True)):
            all_of_it = Piece(
                "".join(piece.text for piece in pieces),
                [mark for piece in pieces for mark in piece.drafted],
                [its for piece in pieces for its in piece.scored],
            )
            message = {"role": "assistant", "content": all_of_it.text}
            form: dict[str, Any] = {"message": message} if self.asked.chat else {"text": all_of_it.text}
            choices.append({"index": index, **form, **self._beside(text, all_of_it, text.finish)})
        return {**self._head, "object": self._whole, "choices": choices, "usage": self.usage, **self.metrics}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What comes before the first piece of a choice: in a chat, who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._choice(index, {"delta": delta})] if self.asked.chat else []

    def piece(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What a piece is told in: nothing, if neither text nor anything that was asked for is in it."""
        if not (piece.text or piece.scored):
            return []
        said = {"delta": {"content": piece.text}} if self.asked.chat else {"text": piece.text}
        return [self._choice(index, said, piece)]

    def closing(self, index: int) -> dict[str, Any]:
        """Why a choice ended."""
        said: dict[str, Any] = {"delta": {}} if self.asked.chat else {"text": ""}
        return self._choice(index, said, finish=self.texts[index].finish)

    def last(self) -> list[dict[str, Any]]:
        """What comes behind all choices: usage, where it was asked for."""
        chunk = {**self._head, "object": self._chunk, "choices": [], "usage": self.usage, **self.metrics}
        return [chunk] if self.asked.include_usage else []

    def _choice(
        self, index: int, said: dict[str, Any], piece: Piece | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **said, **self._beside(self.texts[index], piece, finish)}
        now = self.usage if self.asked.continuous_usage else None
        usage = {"usage": now} if self.asked.include_usage else {}
        return {**self._head, "object": self._chunk, "choices": [choice], **usage}

    def _beside(self, text: Text, piece: Piece | None, finish: str | None) -> dict[str, Any]:
        """What a choice says beside its text."""
        asked = self.asked
        found = None if asked.log_probs is None or piece is None else self._log_probs(piece)
        mark = {} if piece is None else {"spans": piece.spans, "tokens": text.tokens, "cycles": text.cycles}
        ours = {"coral": mark} if asked.marks and mark else {}
        return {"logprobs": found, "finish_reason": finish, **ours}

    def _log_probs(self, piece: Piece) -> dict[str, Any]:
        if self.asked.chat:
            content = [self._chat_token(its) for _, its in piece.scored if not isinstance(its, int)]
            return {"content": content, "refusal": None}
        parts: dict[str, list[Any]] = {
            "text_offset": [], "tokens": [], "token_logprobs": [], "top_logprobs": []
        }  # fmt: skip
        for place, its in piece.scored:
            parts["text_offset"].append(place)
            parts["tokens"].append(self._names.unique(its if isinstance(its, int) else its.token))
            parts["token_logprobs"].append(None if isinstance(its, int) else _finite(its.log_prob))
            parts["top_logprobs"].append(None if isinstance(its, int) else self._likeliest(its))
        return parts

    def _likeliest(self, scored: Scored) -> dict[str, float]:
        """The likeliest tokens and, wherever it stands, the one written; of equal names the first."""
        found: dict[str, float] = {}
        for token, log_prob in (*scored.likeliest, (scored.token, scored.log_prob)):
            found.setdefault(self._names.unique(token), _finite(log_prob))
        return found

    def _chat_token(self, scored: Scored) -> dict[str, Any]:
        best = [self._token(*its) for its in scored.likeliest]
        return {**self._token(scored.token, scored.log_prob), "top_logprobs": best}

    def _token(self, token: int, log_prob: float) -> dict[str, Any]:
        return {
            "token": self._names(token), "logprob": _finite(log_prob), "bytes": self._names.bytes(token)
        }  # fmt: skip

    @property
    def usage(self) -> dict[str, int]:
        written = sum(text.tokens for text in self.texts)
        prompt = self.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }

    @property
    def metrics(self) -> dict[str, Any]:
        """How drafting fared, under vLLM's names; of a single text."""
        if len(self.texts) > 1:
            return {}
        (text,) = self.texts
        drafting = {
            "num_spec_steps": text.drafts,
            "num_draft_tokens": text.drafted,
            "num_accepted_draft_tokens": text.accepted,
            "mean_acceptance_length": 1 + text.accepted / text.drafts if text.drafts else 1.0,
            "draft_acceptance_rate": text.accepted / text.drafted if text.drafted else 0.0,
        }
        return {"metrics": {"speculative_decoding": drafting}}


def _finite(log_prob: float) -> float:
    return max(log_prob, _LEAST)
