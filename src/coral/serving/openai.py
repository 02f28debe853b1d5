"""OpenAI's protocol: what a body asks for, and how it is refused. It knows no server and no model.

A field that is not done here is refused and never ignored, unless it has the value that turns it off.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coral.decoding.text import stop_strings

OFF: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none",),
    "functions": ([],), "function_call": ("none",), "parallel_tool_calls": (True, False),
    "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0), "repetition_penalty": (1, 1.0),
    "top_logprobs": (0,), "min_p": (0, 0.0), "stop_token_ids": ([],),
    "echo": (False,), "suffix": ("",), "best_of": (1,), "modalities": (["text"],),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "skip_special_tokens": (True,),
}  # fmt: skip
"""Fields that are not done, or not by all routes, and the values with which they ask for nothing."""
MOST_LOG_PROBS = 20
"""The likeliest tokens that may be listed at each place, as in vLLM."""
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
    continuous_usage_stats: bool = False


class _Ours(_Strict):
    """What no other server knows. drafting: false is plain decoding, of the same text. mark: pieces say which
    characters come from accepted draft tokens.
    """

    drafting: bool = True
    mark: bool = False


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
    min_tokens: Annotated[int, Field(ge=0)] = 0
    coral: _Ours = _Ours()


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
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOG_PROBS)] | None = None


class _Completion(_Common):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOG_PROBS)] | None = None


class _Tokenize(_Strict):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None


class _Detokenize(_Strict):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


@dataclass(frozen=True)
class Asked:
    """What a request wants: `n` texts behind each prompt, with the options of `LLM.start`.

    least: tokens that are written at least. echo: the prompt is repeated. log_probs: how many of the
    likeliest tokens are listed at each place; None: no log-probabilities. drafting, marks: see `_Ours`.
    """

    model: str | None
    chat: bool
    prompts: list[Any]
    n: int
    options: dict[str, Any]
    stream: bool
    include_usage: bool
    continuous_usage: bool = False
    least: int = 0
    echo: bool = False
    log_probs: int | None = None
    drafting: bool = True
    marks: bool = False


def read_chat(body: Any, longest: int) -> Asked:
    """What a body of /v1/chat/completions asks for; `longest`: tokens of an answer that names no limit.

    Raises:
        Refused: it cannot be read, or asks for what is not done.
    """
    asked = _parsed(_Chat, body)
    limit = asked.max_completion_tokens or asked.max_tokens or longest
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refused("top_logprobs needs logprobs: true.", param="top_logprobs")
    read = _asked(asked, True, [[message.plain for message in asked.messages]], limit)
    return replace(read, log_probs=asked.top_logprobs or 0) if asked.logprobs else read


def read_completion(body: Any, longest: int) -> Asked:
    """The same of /v1/completions, whose answers have 16 tokens where no limit is named, as OpenAI's do."""
    asked = _parsed(_Completion, body)
    prompts: Any = asked.prompt
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    if not prompts:
        raise Refused("prompt holds nothing; give a text, token ids, or several of them.", param="prompt")
    if asked.echo and asked.logprobs is not None and asked.n > 1:
        raise Refused("echo with logprobs says the same of a prompt n times; use n: 1.", param="n")
    read = _asked(asked, False, prompts, asked.max_tokens or min(16, longest))
    return replace(read, echo=asked.echo, log_probs=asked.logprobs)


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
    for name in [name for name in given if name in OFF and name not in form.model_fields]:
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
    if asked.min_tokens > limit:
        raise Refused(f"min_tokens is above the {limit} tokens that may be written.", param="min_tokens")
    return Asked(
        asked.model,
        chat,
        prompts,
        asked.n,
        options,
        asked.stream,
        asked.stream_options.include_usage,
        asked.stream_options.include_usage and asked.stream_options.continuous_usage_stats,
        least=asked.min_tokens,
        drafting=asked.coral.drafting,
        marks=asked.coral.mark,
    )
