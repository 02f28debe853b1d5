"""Records as people have them: what can be used is used, what was cut or joined is counted, and every reason
names the key that was looked at.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.data.conversations import BadRecordError, Dropped, parse, read


def said(*turns: tuple[str, Any], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


Q, A = ("user", "q"), ("assistant", "a")
SHARED = ("from", "value")
ASKED = said(Q, A)
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "role and content": ({"messages": said(Q, A)}, ASKED),
    "role and content under conversations": ({"conversations": said(Q, A)}, ASKED),
    "one conversation": ({"conversation": said(Q, A)}, ASKED),
    "from and value": ({"conversations": said(("human", "q"), ("gpt", "a"), keys=SHARED)}, ASKED),
    "from and value under messages": ({"messages": said(("Human", "q"), ("GPT", "a"), keys=SHARED)}, ASKED),
    "other names of roles": ({"messages": said(("human", "q"), ("model", "a"))}, ASKED),
    "both keys, one of them null": (
        {"messages": [{"role": None, "from": "human", "content": None, "value": "q"}, said(A)[0]]},
        ASKED,
    ),
    "an empty column beside": ({"messages": [], "conversations": said(Q, A)}, ASKED),
    "texts": ({"prompt": "q", "completion": "a"}, ASKED),
    "turns": ({"prompt": said(Q), "completion": said(A)}, ASKED),
    "a response": ({"prompt": "q", "response": "a"}, ASKED),
    "parts": ({"messages": said(("user", [{"type": "text", "text": "q"}]), ("assistant", ["a"]))}, ASKED),
    "a system column": (
        {"system": "s", "conversations": said(("human", "q"), ("gpt", "a"), keys=SHARED)},
        said(("system", "s"), Q, A),
    ),
    "a system prompt": ({"system_prompt": "s", "prompt": "q", "response": "a"}, said(("system", "s"), Q, A)),
    "both": ({"system": "s", "messages": said(("system", "s"), Q, A)}, said(("system", "s"), Q, A)),
    "a developer": ({"messages": said(("developer", "s"), Q, A)}, said(("system", "s"), Q, A)),
    "an empty system column": ({"system": "", "messages": said(Q, A)}, ASKED),
    "more keys": (
        {"messages": [said(Q)[0] | {"name": "x"}, said(A)[0] | {"weight": 1, "tool_calls": None}]},
        ASKED,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_its_messages(name: str) -> None:
    """Stops: a form of a public dataset that is dropped, a system message that is lost, roles confused."""
    record, expected = FORMS[name]
    changes: list[str] = []
    assert parse(record, changes=changes) == parse(json.dumps(record).encode()) == expected
    assert changes == []


LATER = (Q, ("assistant", "b"))
CUT: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], str]] = {
    "leading answer": (said(A, Q, A), ASKED, "an answer before the first user turn was left out"),
    "leading answer behind a system message": (
        said(("system", "s"), A, Q, A),
        said(("system", "s"), Q, A),
        "an answer before the first user turn was left out",
    ),
    "doubled user": (
        said(("user", "p"), Q, A),
        said(("user", "p\n\nq"), A),
        "user messages in a row were joined, with an empty line between",
    ),
    "empty last answer": (
        said(Q, A, Q, ("assistant", " \n")),
        ASKED,
        "cut before the first turn that cannot be used: 'content' of a turn is empty",
    ),
    "null last answer": (
        said(("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", None), keys=SHARED),
        ASKED,
        "cut before the first turn that cannot be used: 'value' of a turn is empty",
    ),
    "unanswered last question": (said(Q, A, Q), ASKED, "cut before a last user turn without an answer"),
    "empty system message": (said(("system", ""), Q, A), ASKED, "an empty system message was left out"),
    "system message in the middle": (
        said(Q, A, ("system", "s"), *LATER),
        ASKED,
        "cut before the first turn that cannot be used: a system message in the middle of a conversation",
    ),
    "second answer": (
        said(Q, A, A, *LATER),
        ASKED,
        "cut before the first turn that cannot be used: a second answer to one user turn",
    ),
    "tool call": (
        [*said(Q, A, Q), {"role": "assistant", "content": "b", "tool_calls": [{"id": 1}]}],
        ASKED,
        "cut before the first turn that cannot be used: an answer has 'tool_calls' beside its text",
    ),
    "tool": (
        said(Q, A, ("tool", "t"), *LATER),
        ASKED,
        "cut before the first turn that cannot be used: "
        "'role' of a turn is not system, user (human) or assistant (gpt)",
    ),
    "image": (
        said(Q, A, ("user", [{"type": "image_url", "image_url": "x"}]), *LATER),
        ASKED,
        "cut before the first turn that cannot be used: 'content' of a turn has a part that is no text",
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_the_usable_part_is_kept_and_what_was_cut_is_counted(tmp_path: Path, name: str) -> None:
    """Stops: a conversation that is dropped for its last turn, and one that is shortened without a word."""
    turns, kept, change = CUT[name]
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({"messages": turns}) + "\n")
    dropped = Dropped()
    assert [conversation.messages for conversation in read(source, dropped)] == [kept]
    assert dropped.changed == {change: 1} and dropped.total == 0 and dropped.read == 1


BAD: dict[str, tuple[object, str]] = {
    "'content' of a turn is not a text": ({"messages": said(("user", 3), A)}, "int"),
    "'value' of a turn is not a text": ({"conversations": said(("human", {}), keys=SHARED)}, "dict"),
    "'from' of a turn is not system, user (human) or assistant (gpt)": (
        {"conversations": said(("bing", "q"), keys=SHARED)},
        "'bing'",
    ),
    "'messages' is empty": ({"messages": []}, ""),
    "'messages' is not a list of turns": ({"messages": "hello"}, "str"),
    "'system' is not a text": ({"system": 3, "messages": said(Q, A)}, "int"),
    "no assistant turn under 'prompt'": ({"prompt": "q"}, ""),
    "an answer has 'reasoning_content' beside its text": (
        {"messages": [said(Q)[0], said(A)[0] | {"reasoning_content": "t"}]},
        "",
    ),
    "nothing under 'messages', 'conversations', 'conversation' or 'prompt'": (
        {"text": 1, "id": 2},
        "it has 'text', 'id'",
    ),
    "not UTF-8": ('{"messages": "é"}'.encode("latin-1"), ""),
}


@pytest.mark.parametrize("reason", BAD)
def test_reasons_name_the_key(reason: str) -> None:
    """Stops: "a content is empty", which nobody finds in a file of from and value."""
    record, detail = BAD[reason]
    with pytest.raises(BadRecordError) as caught:
        parse(record)
    assert (str(caught.value), caught.value.detail) == (reason, detail)


def test_prompts_are_read_whatever_their_answers_are() -> None:
    """Stops: a question that is never asked because the old answer to the one before it is empty."""
    turns = said(A, Q, ("assistant", None), ("user", "r"), ("assistant", 3), A, ("user", "s"))
    asked = [m["content"] for m in parse({"messages": turns}, prompts_only=True) if m["role"] == "user"]
    assert asked == ["q", "r", "s"]
    with pytest.raises(BadRecordError, match="no user turn under 'messages'"):
        parse({"messages": said(A)}, prompts_only=True)


turn = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "assistant", "tool", None]),
    st.sampled_from(["x", "y z", "", None, 3, ["part"]]),
)


@given(st.lists(turn, max_size=8), st.booleans())
def test_what_is_used_is_always_a_conversation(turns: list[dict[str, Any]], prompts_only: bool) -> None:
    """Stops: roles that do not alternate, which a template would refuse or, worse, take."""
    try:
        messages = parse({"messages": turns}, prompts_only=prompts_only)
    except BadRecordError:
        return
    roles = [message["role"] for message in messages]
    roles = roles[roles[0] == "system" :]
    assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))] or prompts_only
    assert roles[0] == "user" and (prompts_only or roles[-1] == "assistant")
    assert all(message["content"] for message in messages) or prompts_only


def test_all_reasons_are_told_in_one_line(tmp_path: Path) -> None:
    """Stops: a file without one usable record of which only the first fault is shown."""
    source = tmp_path / "x.jsonl"
    source.write_text("[1]\n{\n" + json.dumps({"text": 1}) + "\n{\n")
    dropped = Dropped()
    assert list(read(source, dropped)) == [] and dropped.read == 4
    assert str(dropped) == (
        f"4 records dropped: 2 x unreadable JSON (the first is {source}:2), "
        f"1 x not a JSON object (the first is {source}:1), "
        "1 x nothing under 'messages', 'conversations', 'conversation' or 'prompt' "
        f"(the first is {source}:3, it has 'text')"
    )


def test_a_system_column_beside_a_system_message_is_counted() -> None:
    """Stops a column that is left out without a word."""
    changes: list[str] = []
    parse({"system": "other", "messages": said(("system", "s"), Q, A)}, changes=changes)
    assert changes == ["a 'system' column was left out: the turns have a system message of their own"]
    parse({"system": "s", "messages": said(("system", "s"), Q, A)}, changes=changes)
    assert len(changes) == 1
