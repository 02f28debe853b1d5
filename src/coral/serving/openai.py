"""OpenAI's protocol as dicts: what a body asks for, and what is answered. It knows no server and no model.

A field that is not done here is refused and never ignored, unless it has the value that turns it off.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coral.decoding.text import Detokenizer, cut_at, stop_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from coral.decoding.state import Cycle

OFF: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none",),
    "functions": ([],), "function_call": ("none",), "parallel_tool_calls": (True, False),
    "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0), "repetition_penalty": (1, 1.0),
    "logprobs": (False,), "top_logprobs": (0,), "min_p": (0, 0.0), "min_tokens": (0,),
    "stop_token_ids": ([],), "echo": (False,), "suffix": ("",), "best_of": (1,), "modalities": (["text"],),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "skip_special_tokens": (True,),
}  # fmt: skip
"""Fields that are not done, and the values with which they ask for nothing."""
NOTES = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields that have nothing to do with what is answered."""


class Refused(Exception):
    """A request that is not answered.

    status: of HTTP. kind, param, code: as OpenAI's errors have them.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        # A client's own words may hold halves of characters, which no answer can.
        readable = {k: v and v.encode("utf-8", "backslashreplace").decode() for k, v in error.items()}
        return {"error": readable}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _StreamOptions(_Strict):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class _Common(_Strict):
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] = []
    temperature: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    ignore_eos: bool = False


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def plain(self) -> dict[str, str]:
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _Chat(_Common):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class _Completion(_Common):
    prompt: str | list[str] | list[int] | list[list[int]]


class _Tokenize(_Strict):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None


class _Detokenize(_Strict):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


@dataclass(frozen=True)
class Asked:
    """What a request wants: `n` texts behind each prompt, with the options of `LLM.start`."""

    model: str | None
    chat: bool
    prompts: list[Any]
    n: int
    options: dict[str, Any]
    stream: bool
    include_usage: bool


def read_chat(body: Any, longest: int) -> Asked:
    """What a body of /v1/chat/completions asks for; `longest`: tokens of an answer that names no limit.

    Raises:
        Refused: it cannot be read, or asks for what is not done.
    """
    asked = _parsed(_Chat, body)
    limit = asked.max_completion_tokens or asked.max_tokens or longest
    return _asked(asked, True, [[message.plain for message in asked.messages]], limit)


def read_completion(body: Any, longest: int) -> Asked:
    """The same of /v1/completions, whose answers have 16 tokens where no limit is named, as OpenAI's do."""
    asked = _parsed(_Completion, body)
    prompts: Any = asked.prompt
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    if not prompts:
        raise Refused("prompt holds nothing; give a text, token ids, or several of them.", param="prompt")
    return _asked(asked, False, prompts, asked.max_tokens or min(16, longest))


def read_tokenize(body: Any) -> tuple[str | None, Any]:
    """The model that /tokenize names, and its prompt: a text or messages."""
    asked = _parsed(_Tokenize, body)
    if (asked.prompt is None) == (asked.messages is None):
        raise Refused("give either a prompt or messages.", param="prompt")
    return asked.model, asked.prompt or [message.plain for message in asked.messages or ()]


def read_detokenize(body: Any) -> tuple[str | None, list[int]]:
    """The model and ids of /detokenize."""
    asked = _parsed(_Detokenize, body)
    return asked.model, asked.tokens


def _parsed(form: Any, body: Any) -> Any:
    """A body as one of the forms above; null stands for what was left out."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object.")
    given = {name: value for name, value in body.items() if value is not None and name not in NOTES}
    for name in [name for name in given if name in OFF]:
        value = given.pop(name)
        if not any(type(value) is type(off) and value == off for off in OFF[name]):
            raise Refused(f"{name} is not supported here; leave it out.", param=name, code="unsupported")
    if "messages" in given and isinstance(given["messages"], list):
        given["messages"] = [_without_nulls(message) for message in given["messages"]]
    try:
        return form.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = ".".join(str(part) for part in first["loc"][:3]) or "body"
        raise Refused(f"{name}: {first['msg']}.", param=name) from None


def _without_nulls(message: Any) -> Any:
    """An answer of ours that a client sends back holds fields without a value."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None and value != []}


def _asked(asked: Any, chat: bool, prompts: list[Any], limit: int) -> Asked:
    options = {
        "chat": chat,
        "max_new_tokens": limit,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": max(0, asked.top_k),
        "seed": secrets.randbelow(2**63) if asked.seed is None else asked.seed % 2**63,
        "stop": stop_strings(asked.stop),
        "ignore_eos": asked.ignore_eos,
    }
    usage = asked.stream_options.include_usage
    return Asked(asked.model, chat, prompts, asked.n, options, asked.stream, usage)


class Text:
    """One answer as it comes: pieces join to the text in front of the first stop string.

    Held back is what may become a stop string, or is half of a character.

    tokens: how many were written. finish: why it ended, "stop" or "length"; None: it goes on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.stop, self.tokens, self.finish = stop, 0, ""
        self.drafts, self.drafted, self.accepted = 0, 0, 0
        self._detokenizer, self._held, self._ended = Detokenizer(tokenizer), "", False

    def push(self, cycle: Cycle, finish: str = "") -> str:
        """The next piece; `finish` says why the text ends with this cycle."""
        self.tokens += len(cycle.tokens)
        self.drafts += cycle.num_drafted > 0
        self.drafted, self.accepted = self.drafted + cycle.num_drafted, self.accepted + cycle.num_accepted
        self.finish = finish
        if self._ended:
            return ""
        held = self._held + "".join(map(self._detokenizer.push, cycle.tokens))
        if finish:
            held += self._detokenizer.rest()
        piece = cut_at(held, self.stop)
        self._ended = len(piece) < len(held)
        if not (self._ended or finish):
            piece = piece[: len(piece) - _begun(piece, self.stop)]
        self._held = held[len(piece) :]
        return piece


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

    def __init__(self, asked: Asked, model: str, prompt_tokens: int, texts: Sequence[Text]) -> None:
        self.asked, self.prompt_tokens, self.texts = asked, prompt_tokens, texts
        name = "chatcmpl" if asked.chat else "cmpl"
        self._head = {"id": f"{name}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._whole = "chat.completion" if asked.chat else "text_completion"
        self._chunk = "chat.completion.chunk" if asked.chat else "text_completion"

    def whole(self, pieces: Sequence[str]) -> dict[str, Any]:
        """All of it; a piece is the whole text of a choice."""
        choices = []
        for index, (text, piece) in enumerate(zip(self.texts, pieces, strict=True)):
            said = (
                {"message": {"role": "assistant", "content": piece}} if self.asked.chat else {"text": piece}
            )
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": text.finish})
        return {**self._head, "object": self._whole, "choices": choices, "usage": self.usage, **self.metrics}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What comes before the first piece of a choice: in a chat, who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._choice(index, {"delta": delta})] if self.asked.chat else []

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return self._choice(index, {"delta": {"content": text}} if self.asked.chat else {"text": text})

    def closing(self, index: int) -> dict[str, Any]:
        """Why a choice ended."""
        said: dict[str, Any] = {"delta": {}} if self.asked.chat else {"text": ""}
        return self._choice(index, said, self.texts[index].finish)

    def last(self) -> list[dict[str, Any]]:
        """What comes behind all choices: usage, where it was asked for."""
        chunk = {**self._head, "object": self._chunk, "choices": [], "usage": self.usage, **self.metrics}
        return [chunk] if self.asked.include_usage else []

    def _choice(self, index: int, said: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self.asked.include_usage else {}
        return {**self._head, "object": self._chunk, "choices": [choice], **usage}

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
