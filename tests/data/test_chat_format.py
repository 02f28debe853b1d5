"""What is trained is what the record says and the target would have read and written, whatever the template
does, and in a time that grows with the conversation.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, CLOSED, EOT, FORGETFUL, PLAIN, PREFILLS, STRIPS, TEXT_ONLY, tiny_tokenizer

from coral.data.chat_format import ROUNDS, ChatFormat, Example, end_of_turn
from coral.data.conversations import BadRecordError, Conversation, Message
from coral.errors import CoralError

CHATS = {
    name: ChatFormat(tiny_tokenizer(template))
    for name, template in {"plain": PLAIN, "chatml": CHATML, "closed": CLOSED, "text only": TEXT_ONLY}.items()
}


def turns(*contents: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def by_prefixes(chat: ChatFormat, messages: list[Message]) -> Example:
    """The slow twin: every prefix rendered and read from its beginning."""
    ids: list[int] = []
    mask: list[bool] = []
    for answer in range(1, len(messages), 2):
        prompt = chat.tokenize(chat.render(messages[:answer], generation_prompt=True))
        full = chat.tokenize(chat.render(messages[: answer + 1]))
        assert full[: len(prompt)] == prompt and prompt[: len(ids)] == ids
        written = full[len(prompt) :]
        if chat.end_id is not None:
            written = written[: written.index(chat.end_id) + 1]
        mask += [False] * (len(prompt) - len(ids)) + [True] * len(written)
        ids = prompt + written
    return Example(ids, mask)


lengths = st.integers(1, 3 * ROUNDS)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CHATS)), lengths, st.booleans(), st.randoms(use_true_random=False))
def test_long_conversations_are_what_their_prefixes_are(
    name: str, rounds: int, system: bool, draw: Any
) -> None:
    """Stops: a token, or a bit of the mask, that depends on how the text was put together."""
    words = ["a", "the man", "in\nan", "x  y", "é", "🙂", "ther"]
    messages = turns(*("X" + " ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(2 * rounds)))
    if system:
        messages = [{"role": "system", "content": "be the"}, *messages]
        assert CHATS[name].encode(Conversation("x:1", messages)).loss_mask.count(True) > 0
        return
    example = CHATS[name].encode(Conversation("x:1", messages))
    assert example == by_prefixes(CHATS[name], messages)


def test_the_work_grows_with_the_conversation_and_not_with_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stops: ten seconds for a conversation of 800 answers."""

    def work(rounds: int) -> tuple[int, int]:
        chat = ChatFormat(tiny_tokenizer(CHATML))
        done = [0, 0]

        def counting(kind: int, call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(given: Any, **options: Any) -> Any:
                done[kind] += len(given)
                return call(given, **options)

            return counted

        monkeypatch.setattr(chat, "render", counting(0, chat.render))
        monkeypatch.setattr(chat, "tokenize", counting(1, chat.tokenize))
        chat.encode(Conversation("x:1", turns(*["the man"] * 2 * rounds)))
        return done[0], done[1]

    few, many = work(4 * ROUNDS), work(16 * ROUNDS)
    assert all(more <= 5 * less for less, more in zip(few, many, strict=True))


def written(chat: ChatFormat, example: Example) -> str:
    ids = [i for i, trained in zip(example.input_ids, example.loss_mask, strict=True) if trained]
    return str(chat.tokenizer.decode(ids))


def test_an_answer_that_the_template_shortens_is_trained_as_the_record_has_it() -> None:
    """Stops: a thought that the target wrote and that is left out of training without a word."""
    chat, changes = ChatFormat(tiny_tokenizer(STRIPS)), []
    thinks = "<think>\none\n</think>\n\ntwo"
    example = chat.encode(Conversation("x:1", turns("q", thinks)), changes=changes)
    assert written(chat, example) == thinks + "<|eot|>" and example.input_ids[-1] == EOT
    assert changes == [
        "an answer is trained as the record has it, for the chat template leaves out a part of it"
    ]
    both = Conversation("x:1", turns("q", thinks, "r", thinks))
    with pytest.raises(CoralError, match=r"rewrites history.*--last-turn-only"):
        chat.encode(both)
    example = chat.encode(both, last_turn_only=True)
    text = chat.tokenizer.decode(example.input_ids)
    assert text == f"<|user|>q<|eot|><|assistant|>\n\ntwo<|eot|><|user|>r<|eot|><|assistant|>{thinks}<|eot|>"
    plain: list[str] = []
    chat.encode(Conversation("x:1", turns("q", "two")), changes=plain)
    assert plain == []


@pytest.mark.parametrize(
    "content", ["<think>\none\n</think>\n\ntwo", "<think>one\n</think>\n\ntwo", "one\n</think>\n\ntwo"]
)
def test_a_generation_prompt_that_begins_the_answer(content: str) -> None:
    """Stops: R1's template, which could not be prepared at all; a `<think>` that stands there twice, or is
    trained although the target reads it.
    """
    chat = ChatFormat(tiny_tokenizer(PREFILLS))
    assert chat.prefill == "<think>\n"
    for messages in (turns("q", content), turns("p", "<think>\nzero</think>a", "q", content)):
        example = chat.encode(Conversation("x:1", messages), last_turn_only=True)
        assert written(chat, example) == "one\n</think>\n\ntwo<|eot|>"
        text = chat.tokenizer.decode(example.input_ids)
        assert (
            text.endswith("<|assistant|><think>\none\n</think>\n\ntwo<|eot|>") and text.count("<think>") == 1
        )
    with pytest.raises(BadRecordError, match=r"begins an answer with <think>, and this one does not"):
        chat.encode(Conversation("x:1", turns("q", "two")))


def test_a_prompt_may_spell_a_special_token_and_an_answer_may_not() -> None:
    """Stops: one policy in training and another in generation; an answer that ends in its middle."""
    chat, changes = CHATS["plain"], []
    example = chat.encode(Conversation("x:1", turns("a <|eot|> b", "c")), changes=changes)
    assert example.input_ids[: example.loss_mask.index(True)] == chat.tokenizer.apply_chat_template(
        turns("a <|eot|> b"), add_generation_prompt=True, return_dict=False
    )
    assert written(chat, example) == "c<|eot|>"
    assert changes == ["a prompt spells a special token, which is read as that token"]
    with pytest.raises(BadRecordError, match="an answer spells a special token"):
        chat.encode(Conversation("x:1", turns("q", "a<|eot|>b")))


def test_templates_that_fail_say_how() -> None:
    """Stops: a traceback of jinja, and records that are read although the template cannot show them."""
    several = tiny_tokenizer()
    several.chat_template = {"rag": PLAIN, "tool_use": PLAIN}  # type: ignore[assignment]
    with pytest.raises(CoralError, match=r"several chat templates \(rag, tool_use\) and none is the default"):
        ChatFormat(several)
    several.chat_template = {"default": PLAIN, "tool_use": "x"}  # type: ignore[assignment]
    assert ChatFormat(several).end_id == EOT
    for template, why in {
        "{{ messages[0]['content'] + 1 }}": "TypeError",
        "{{ 1 // 0 }}": "ZeroDivisionError",
        "{{ nothing.there }}": "undefined",
        "{% for m in %}": "syntax|expected|Expected|unexpected",
    }.items():
        with pytest.raises(CoralError, match=f"the chat template refuses it: .*({why})"):
            ChatFormat(tiny_tokenizer(template))


def test_the_token_that_ends_an_answer() -> None:
    """Stops: an answer that runs on, since the model's config names another token."""
    assert [end_of_turn(tiny_tokenizer(template)) for template in (PLAIN, CLOSED, FORGETFUL)] == [EOT] * 3
    assert end_of_turn(tiny_tokenizer(TEXT_ONLY)) is None and end_of_turn(tiny_tokenizer(None)) is None
