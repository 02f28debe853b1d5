"""Read conversations: whatever form a record has, it becomes checked messages, or a reason why it cannot.

Of a record whose turns are not all usable the part is kept that is: from the first user turn on, up to the
last answer before the first turn that cannot be used. What was cut or joined is counted, as are the records
that are left out; every reason names the key that was looked at.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from coral.data import sources as sources_
from coral.data.sources import ANSWERS, COLUMNS, SYSTEM, Source

Message: TypeAlias = dict[
    str, Any
]  # role, content, and "finished": false where the end token was not written

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}

_APART = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""What an answer may hold beside its text: the target wrote that, too, so its text is not all of it."""


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
    read: int = 0
    """Records that were read, those that are used included."""
    counts: Counter[str] = field(default_factory=Counter)
    """Records that were left out, by reason."""
    changed: Counter[str] = field(default_factory=Counter)
    """Records of which only a part is used, or in another form, by what was done."""
    notes: list[str] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)
    """The first record of each reason, and what it alone has to say."""

    def add(self, where: str, reason: str, detail: str = "") -> None:
        self.first.setdefault(reason, f"{where}{detail and f', {detail}'}")
        self.counts[reason] += 1
        if self.counts[reason] <= self.keep:
            self.notes.append(f"{where}: {reason}{detail and f' ({detail})'}")

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        """All reasons in one line, the most frequent first."""
        reasons = (
            f"{count:,} x {reason} (the first is {self.first[reason]})"
            for reason, count in self.counts.most_common()
        )
        return f"{self.total:,} record{'s' * (self.total > 1)} dropped: {', '.join(reasons)}"


@dataclass(frozen=True)
class Conversation:
    """Checked messages: an optional system message, then user and assistant in turn."""

    where: str  # "file:line", the record's identity
    messages: list[Message]

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


def read(
    sources: Source | Sequence[Source],
    dropped: Dropped,
    *,
    prompts_only: bool = False,
) -> Iterator[Conversation]:
    """Yield the conversations of all sources (see `coral.data.sources`) in order, one at a time.

    Bad records go to `dropped`. With `prompts_only` nothing needs to be answered yet: a conversation may end
    with a user turn, and answers are not looked at.

    Raises:
        CoralError: a source is missing, cannot be read to its end, or has no column of conversations.
    """
    for where, record in sources_.records(sources):
        dropped.read += 1
        changes: list[str] = []
        try:
            messages = parse(record, prompts_only=prompts_only, changes=changes)
        except BadRecordError as error:
            dropped.add(where, str(error), error.detail)
            continue
        dropped.changed.update(dict.fromkeys(changes, 1))
        yield Conversation(where, messages)


def parse(record: Any, *, prompts_only: bool = False, changes: list[str] | None = None) -> list[Message]:
    """Messages of one record (or its JSON): those that can be used, up to the last answer or, with
    `prompts_only`, user turn.

    A record holds turns under `messages`, `conversations` or `conversation`, each with `role` and `content`
    or, as in ShareGPT, `from` and `value`; or a `prompt` (a text that the user says, or turns), perhaps with
    its answer under `completion` or `response`. A `system` column is the system message of turns without one.
    Other columns are not read; null is as good as absent. What was cut or joined is appended to `changes`.

    Raises:
        BadRecordError: it is no conversation that can be trained on.
    """
    changes = [] if changes is None else changes
    column, turns = _turns(_decoded(record), changes)
    messages: list[Message] = []
    fault: BadRecordError | None = None
    for turn in turns:
        try:
            _append(messages, turn, changes, prompts_only)
        except BadRecordError as error:
            fault = error
            break
    needed = "user" if prompts_only else "assistant"
    if not any(message["role"] == needed for message in messages):
        raise fault or BadRecordError(f"no {needed} turn under '{column}'")
    unanswered = False
    while messages[-1]["role"] != "assistant" and not prompts_only:
        unanswered = bool(messages.pop())
    if fault is not None:
        changes.append(f"cut before the first turn that cannot be used: {fault}")
    elif unanswered:
        changes.append("cut before a last user turn without an answer")
    return messages


def _decoded(record: Any) -> dict[str, Any]:
    if isinstance(record, bytes | str):
        try:
            record = json.loads(record)
        except UnicodeDecodeError as error:
            raise BadRecordError("not UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise BadRecordError("unreadable JSON") from error
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object")
    return record


def _turns(record: dict[str, Any], changes: list[str]) -> tuple[str, list[Any]]:
    """The column that holds the conversation, and its turns with the system message of a column beside it."""
    present = [name for name in COLUMNS if record.get(name) is not None]
    if not present:
        held = f"it has {', '.join(map(repr, list(record)[:8])) or 'nothing'}"
        raise BadRecordError(f"nothing under {', '.join(map(repr, COLUMNS[:-1]))} or {COLUMNS[-1]!r}", held)
    column = next((name for name in present if record[name]), present[0])
    turns = record[column]
    if column == "prompt":
        turns = _said(turns, "user")
        answer = next((record[name] for name in ANSWERS if record.get(name) is not None), None)
        if answer is not None and isinstance(turns, list):
            answered = _said(answer, "assistant")
            turns = [*turns, *(answered if isinstance(answered, list) else [answered])]
    if not isinstance(turns, list):
        raise BadRecordError(f"'{column}' is not a list of turns", type(turns).__name__)
    if not turns:
        raise BadRecordError(f"'{column}' is empty")
    system = next((name for name in SYSTEM if record.get(name)), None)
    if system is None:
        return column, turns
    if not isinstance(record[system], str):
        raise BadRecordError(f"'{system}' is not a text", type(record[system]).__name__)
    if any(isinstance(turn, dict) and _role(turn) == "system" for turn in turns[:1]):
        if turns[0].get(_key(turns[0], "content", "value")) != record[system]:
            changes.append(f"a '{system}' column was left out: the turns have a system message of their own")
        return column, turns
    return column, [{"role": "system", "content": record[system]}, *turns]


def _said(said: Any, role: str) -> Any:
    """A plain text as a single turn."""
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _append(messages: list[Message], turn: Any, changes: list[str], prompts_only: bool) -> None:
    """Add a turn to the messages before it, if it is one of theirs.

    Raises:
        BadRecordError: it cannot be used, and so nothing behind it.
    """
    if not isinstance(turn, dict):
        raise BadRecordError("a turn is not a JSON object", type(turn).__name__)
    role = _role(turn)
    before = messages[-1]["role"] if messages else None
    if role == "assistant" and before in (None, "system"):
        changes.append("an answer before the first user turn was left out")
        return
    key = _key(turn, "content", "value")
    if role == "assistant" and prompts_only:  # it will be written again
        if before == "user":
            messages.append({"role": role, "content": str(turn.get(key) or "")})
        return
    content = _text(turn.get(key), key)
    if not content and role == "system":
        changes.append("an empty system message was left out")
        return
    if not content:
        raise BadRecordError(f"'{key}' of a turn is empty")
    if role == "system" and before not in (None, "system"):
        raise BadRecordError("a system message in the middle of a conversation")
    if role == "assistant":
        if before == "assistant":
            raise BadRecordError("a second answer to one user turn")
        if apart := next((name for name in _APART if turn.get(name)), None):
            raise BadRecordError(f"an answer has '{apart}' beside its text")
    elif role == before:
        messages[-1]["content"] += f"\n\n{content}"
        changes.append(f"{role} messages in a row were joined, with an empty line between")
        return
    finished = turn.get("finished")
    if not isinstance(finished, bool | None):
        raise BadRecordError("'finished' is not true or false")
    message: Message = {"role": role, "content": content}
    messages.append(message | {"finished": False} if finished is False else message)


def _role(turn: dict[str, Any]) -> str:
    key = _key(turn, "role", "from")
    role = turn.get(key)
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRecordError(
            f"'{key}' of a turn is not system, user (human) or assistant (gpt)", repr(role)[:40]
        )
    return known


def _key(turn: dict[str, Any], *names: str) -> str:
    """The one of the names that the turn has; null is as good as absent, unless all are."""
    filled = [name for name in names if turn.get(name) is not None]
    return (filled or [name for name in names if name in turn] or names)[0]


def _text(content: Any, key: str) -> str:
    """A content as one text, of which it may be the parts: texts, or {"type": "text", "text": ...}; "" where
    there is nothing to read in it.
    """
    if isinstance(content, list):
        parts: list[Any] = [
            part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
            for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise BadRecordError(f"'{key}' of a turn has a part that is no text")
        content = "".join(parts)
    if not isinstance(content, str | None):
        raise BadRecordError(f"'{key}' of a turn is not a text", type(content).__name__)
    content = content or ""
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(f"'{key}' of a turn is not valid Unicode (half of a surrogate pair)") from error
    return content if content.strip() else ""
