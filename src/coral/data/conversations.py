"""Read conversations, and turn each into token ids with a mask of what the target is to write.

The chat template of the tokenizer is the only authority on the format; there is no table of templates.
Where an answer starts and ends is found by rendering prefixes of the conversation:

    prompt = render(messages before the answer, with the generation prompt)     what the target reads
    full   = render(messages up to and with the answer)                         begins with `prompt`
    answer = what `full` adds, cut after the end token                          what the target writes

The end token is the first special token that the template puts after an answer. What a template adds behind
it (the newline after `<|im_end|>`, the end-of-text token of Phi-3) is not written by the target: it is part
of the next prompt or of nothing, and never trained. Without such a token the whole addition is trained.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from coral.data import sources as sources_
from coral.data.sources import COLUMNS, Source
from coral.errors import CoralError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = dict[
    str, Any
]  # role, content, and "finished": false where the end token was not written

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PROBE = "coral-probe-answer"


class BadRecordError(Exception):
    """One record cannot be used; the message is the reason, the same for all records with the same fault.

    `detail` is what only this record has to say of it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


@dataclass
class Dropped:
    """What was left out and why: every reason with its count and first `keep` records, by file and line."""

    keep: int = 5
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str, detail: str = "") -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= self.keep:
            self.notes.append(f"{where}: {reason}{detail and f' ({detail})'}")

    @property
    def total(self) -> int:
        return self.counts.total()


@dataclass(frozen=True)
class Conversation:
    """Checked messages: an optional system message, then user and assistant in turn."""

    where: str  # "file:line", the record's identity
    messages: list[Message]

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class Example:
    """`loss_mask[t]`: the target is to write `input_ids[t]` (end tokens included; not shifted)."""

    input_ids: list[int]
    loss_mask: list[bool]


def read(
    sources: Sequence[Source], dropped: Dropped, *, prompts_only: bool = False
) -> Iterator[Conversation]:
    """Yield the conversations of all sources (see `coral.data.sources`) in order, one at a time.

    Bad records go to `dropped`. With `prompts_only` nothing needs to be answered yet: a conversation may end
    with a user turn.

    Raises:
        CoralError: a source is missing, cannot be read to its end, or has no column of conversations.
    """
    for where, record in sources_.records(sources):
        try:
            yield Conversation(where, parse(record, prompts_only=prompts_only))
        except BadRecordError as error:
            dropped.add(where, str(error), error.detail)


def parse(record: Any, *, prompts_only: bool = False) -> list[Message]:
    """Messages of one record (or its JSON), cut after the last answer unless `prompts_only`.

    A record holds `messages` (role, content), `conversations` (from, value; as in ShareGPT), or a `prompt`: a
    text that the user says, or messages. Other columns are not read, and null is as good as absent.

    Raises:
        BadRecordError: it is no conversation that can be trained on.
    """
    if isinstance(record, bytes | str):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise BadRecordError("unreadable JSON") from error
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object")
    column = next((name for name in COLUMNS if record.get(name) is not None), None)
    turns = record[column] if column else None
    if column == "prompt" and isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list):
        raise BadRecordError("no list under 'messages' or 'conversations', and no 'prompt'", _keys(record))
    keys = ("from", "value") if column == "conversations" else ("role", "content")
    messages = [_message(turn, *keys) for turn in turns]
    while messages and messages[-1]["role"] != "assistant" and not prompts_only:
        messages.pop()
    start = int(messages[:1] != [] and messages[0]["role"] == "system")
    if len(messages) == start:
        raise BadRecordError("no user turn" if prompts_only else "no assistant turn")
    for i, message in enumerate(messages[start:]):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise BadRecordError("roles do not alternate from user to assistant")
    return messages


def _keys(record: dict[str, Any]) -> str:
    return f"it has {', '.join(map(repr, list(record)[:8])) or 'nothing'}"


def _message(turn: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRecordError("a message is not a JSON object")
    role, content, finished = turn.get(role_key), turn.get(content_key), turn.get("finished")
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise BadRecordError("a role is not system, user (human) or assistant (gpt)")
    if not isinstance(content, str):
        raise BadRecordError("a content is not a string")
    if not content.strip():
        raise BadRecordError("a content is empty")
    if not isinstance(finished, bool | None):
        raise BadRecordError("'finished' is not true or false")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError("a content is not valid Unicode") from error
    message: Message = {"role": _ROLES[role.lower()], "content": content}
    return message | {"finished": False} if finished is False else message


class ChatFormat:
    """A tokenizer's chat template, with what was found out about it: the end token, what follows an answer.

    Raises:
        CoralError: the tokenizer has no chat template, or one that does not print answers.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise CoralError(
                f"{name} has no chat template, so conversations cannot be rendered; use the chat (instruct) "
                "version of the target, or set tokenizer.chat_template and save it beside the target."
            )
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special_ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self.special_texts = [text for text in tokenizer.convert_ids_to_tokens([*self.special_ids]) if text]
        try:
            probe = self.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}])
        except BadRecordError as error:
            raise CoralError(f"{name}: {error}; check its chat template.") from error
        if _PROBE not in probe:
            raise CoralError(f"the chat template of {name} does not print answers; use one that does.")
        self.suffix: str = probe.rpartition(_PROBE)[2]  # text behind an answer
        suffix_ids = self.tokenize(self.suffix)
        self.end_id = next((i for i in suffix_ids if i in self.special_ids), None)
        # What a finished answer holds behind its content: text, and number of tokens with the end token.
        self.closing, self.ending = self.suffix, len(suffix_ids)
        if self.end_id is not None:
            end_text = str(tokenizer.convert_ids_to_tokens(self.end_id))
            self.closing = self.suffix.partition(end_text)[0]
            self.ending = suffix_ids.index(self.end_id) + 1

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """Text of the messages; BadRecordError where the template refuses them (a system message, say)."""
        import jinja2

        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=generation_prompt
            )
        except jinja2.TemplateError as error:
            raise BadRecordError(f"the chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text

    def tokenize(self, text: str) -> list[int]:
        """Token ids of rendered text: special tokens are in the text already, so none is added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that the target reads before it answers the last of `messages`, a user turn."""
        self._refuse_special_text(messages)
        return self.tokenize(self.render(messages, generation_prompt=True))

    def encode(self, conversation: Conversation, *, last_turn_only: bool = False) -> Example:
        """Token ids of the conversation, up to and with its last end token, and the mask of its answers.

        The end token of an answer marked "finished": false is not trained: the target did not write it. With
        `last_turn_only` the last answer alone is trained, after the history as the template shows it there.

        Raises:
            BadRecordError: the record cannot be rendered, or tokens of an answer merge with those before it.
            CoralError: the template shows an answer otherwise once it is history.
        """
        messages = conversation.messages
        self._refuse_special_text(messages)
        ids: list[int] = []
        mask: list[bool] = []
        history = ""
        for answer in conversation.answers[-1:] if last_turn_only else conversation.answers:
            prompt_text = self.render(messages[:answer], generation_prompt=True)
            full_text = self.render(messages[: answer + 1])
            if not prompt_text.startswith(history):
                raise CoralError(
                    f"{conversation.where}: the chat template rewrites history (an answer is shown otherwise "
                    "at a later turn), so one row cannot hold every answer with what the target reads before "
                    "it; train on last answers only (--last-turn-only), or use a template that keeps history."
                )
            if not full_text.startswith(prompt_text):
                raise CoralError(
                    f"{conversation.where}: the chat template shows an answer without the generation prompt "
                    "before it, so what the target writes cannot be told from what it reads; use a template "
                    "whose add_generation_prompt adds exactly what precedes an answer."
                )
            prompt, full = self.tokenize(prompt_text), self.tokenize(full_text)
            if prompt[: len(ids)] != ids or full[: len(prompt)] != prompt:
                raise BadRecordError("tokens of an answer merge with the tokens beside it")
            written = full[len(prompt) :]
            if self.end_id in written:
                written = written[: written.index(self.end_id) + 1]
            elif self.end_id is not None:
                raise BadRecordError("the chat template leaves out the end token of an answer")
            mask += [False] * (len(prompt) - len(ids)) + [True] * len(written)
            ids = prompt + written
            if messages[answer].get("finished") is False:
                mask[len(mask) - self.ending :] = [False] * self.ending
            history = full_text.removesuffix(self.suffix)
        return Example(ids, mask)

    def _refuse_special_text(self, messages: Sequence[Message]) -> None:
        """Text that spells a special token would become that token, and end an answer in its middle."""
        if any(text in message["content"] for message in messages for text in self.special_texts):
            raise BadRecordError("a content spells a special token")
