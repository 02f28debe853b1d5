"""Turn a conversation into token ids with a mask of what the target is to write.

The chat template of the tokenizer is the only authority on the format; there is no table of templates.
Where an answer starts and ends is found by rendering prefixes of the conversation:

    prompt = render(messages before the answer, with the generation prompt)     what the target reads
    full   = render(messages up to and with the answer)                         begins with `prompt`
    answer = what `full` adds, cut after the end token                          what the target writes

The end token is the first special token that the template puts after an answer. What a template adds behind
it (the newline after `<|im_end|>`, the end-of-text token of Phi-3) is not written by the target: it is part
of the next prompt or of nothing, and never trained. Without such a token the whole addition is trained.

Where `full` does not hold all of the answer, the record does: a template may leave the thought out of every
answer, and its generation prompt may begin the answer (DeepSeek-R1's `<think>`, "prefill" here). The target
then wrote the record's text, less that beginning.

Text that spells a special token is that token, as it is for transformers, vLLM and llama.cpp, and so for
`coral generate`: in a prompt it is read as such. An answer that spells one is refused, for it would end in
its middle.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coral.data.conversations import BadRecordError, Conversation, Message
from coral.errors import CoralError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUNDS = 8
"""Rounds (a question and its answer) before an answer with which its prompt is rendered, at least: to render
all of them for every answer takes a time that grows with their square."""

_PROBE = "coral-probe-answer"
_MERGED = "tokens of an answer merge with the tokens beside it"
_OWN_TEXT = "an answer is trained as the record has it, for the chat template leaves out a part of it"
_SPECIAL_READ = "a prompt spells a special token, which is read as that token"


@dataclass(frozen=True)
class Example:
    """`loss_mask[t]`: the target is to write `input_ids[t]` (end tokens included; not shifted)."""

    input_ids: list[int]
    loss_mask: list[bool]


class ChatFormat:
    """A tokenizer's chat template, with its end token and the text that it writes behind an answer.

    Raises:
        CoralError: the tokenizer has no chat template, or one that does not print answers.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        name = tokenizer.name_or_path or "the tokenizer"
        refuse_template(tokenizer)
        self.tokenizer = tokenizer
        self.special_texts = special_texts(tokenizer)
        self.special_ids = {int(i) for i in map(tokenizer.convert_tokens_to_ids, self.special_texts)}  # type: ignore[arg-type]
        asked: list[Message] = [{"role": "user", "content": "Hi"}]
        try:
            probe = self.render([*asked, {"role": "assistant", "content": _PROBE}])
            opened = self.render(asked, generation_prompt=True)
        except BadRecordError as error:
            raise CoralError(f"{name}: {error}; check its chat template.") from error
        if _PROBE not in probe:
            raise CoralError(f"the chat template of {name} does not print answers; use one that does.")
        before, _, self.suffix = probe.rpartition(_PROBE)  # the text around an answer
        # What the generation prompt writes of an answer that is yet to come.
        self.prefill = opened[len(before) :] if opened.startswith(before) else ""
        suffix_ids = self.tokenize(self.suffix)
        self.end_id = next((i for i in suffix_ids if i in self.special_ids), None)
        # What a finished answer holds behind its content: text, and number of tokens with the end token.
        self.closing, self.ending, self.end_text = self.suffix, len(suffix_ids), ""
        if self.end_id is not None:
            self.end_text = str(tokenizer.convert_ids_to_tokens(self.end_id))
            self.closing = self.suffix.partition(self.end_text)[0]
            self.ending = suffix_ids.index(self.end_id) + 1

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """Text of the messages; BadRecordError where the template refuses them (a system message, say)."""
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template is a program, which may raise anything
            raise BadRecordError(f"the chat template refuses it: {template_fault(error)}") from error
        assert isinstance(text, str)
        return text

    def tokenize(self, text: str) -> list[int]:
        """Token ids of rendered text: special tokens are in the text already, so none is added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that the target reads before it answers the last of `messages`, a user turn."""
        return self.tokenize(self.render(messages, generation_prompt=True))

    def spells_special(self, text: str) -> bool:
        """Whether a part of the text becomes a special token."""
        return any(special in text for special in self.special_texts)

    def encode(
        self, conversation: Conversation, *, last_turn_only: bool = False, changes: list[str] | None = None
    ) -> Example:
        """Token ids of the conversation, up to and with its last end token, and the mask of its answers.

        The end token of an answer marked "finished": false is not trained: the target did not write it. With
        `last_turn_only` the last answer alone is trained, after the history as the template shows it there.
        What a person should know of it is appended to `changes`.

        Raises:
            BadRecordError: the record cannot be rendered, an answer spells a special token, or its tokens
                merge with those before it.
            CoralError: the template shows an answer otherwise once it is history.
        """
        changes = [] if changes is None else changes
        messages = conversation.messages
        answers = conversation.answers[-1:] if last_turn_only else conversation.answers
        if any(self.spells_special(messages[i]["content"]) for i in answers):
            raise BadRecordError("an answer spells a special token")
        if any(
            self.spells_special(message["content"]) for message in messages if message["role"] != "assistant"
        ):
            changes.append(_SPECIAL_READ)
        ids: list[int] = []
        mask: list[bool] = []
        text = ""  # of which the tokens that follow may depend
        pieces = self._pieces(conversation, answers, changes)
        for answer, (asked, answered) in zip(answers, pieces, strict=True):
            prompt, full = self.tokenize(text + asked), self.tokenize(text + asked + answered)
            known = len(self.tokenize(text)) if text else 0
            if full[: len(prompt)] != prompt or (text and prompt[:known] != ids[-known:]):
                raise BadRecordError(_MERGED)
            written = full[len(prompt) :]
            ids += full[known:]
            mask += [False] * (len(prompt) - known) + [True] * len(written)
            if messages[answer].get("finished") is False:
                mask[len(mask) - self.ending :] = [False] * self.ending
            # No token reaches across a special one, so what follows is read as if the text began with that.
            text = self.end_text or text + asked + answered
        if len(answers) > 1 and self.tokenize("".join(asked + answered for asked, answered in pieces)) != ids:
            raise BadRecordError(_MERGED)
        return Example(ids, mask)

    def _pieces(
        self, conversation: Conversation, answers: Sequence[int], changes: list[str]
    ) -> list[tuple[str, str]]:
        """For each answer what the target reads since the end of the one before, and what it writes.

        The text of long conversations is put together from renderings of `ROUNDS` to twice as many rounds,
        and taken if the rendering of all begins with it; else every prompt is rendered from its beginning.
        """
        messages = conversation.messages
        if len(answers) > 2 * ROUNDS:
            found: list[str] = []
            try:
                pieces = list(self._rendered(conversation, answers, ROUNDS, found))
                if self.render(messages).startswith("".join(asked + answered for asked, answered in pieces)):
                    changes += found
                    return pieces
            except (BadRecordError, CoralError):
                pass  # of a part; the whole decides
        return list(self._rendered(conversation, answers, len(answers), changes))

    def _rendered(
        self, conversation: Conversation, answers: Sequence[int], rounds: int, changes: list[str]
    ) -> Iterator[tuple[str, str]]:
        messages = conversation.messages
        opening = messages[:1] if messages[0]["role"] == "system" else []
        history, begin = "", 0
        for number, answer in enumerate(answers):
            if number >= 2 * rounds and number % rounds == 0:
                begin = answers[number - rounds] - 1
                shown = [*opening, *messages[begin : answer - 1]]
                history = self.render(shown)
                history = (
                    history[: history.rfind(self.end_text) + len(self.end_text)] if self.end_text else history
                )
            shown = [*(opening if begin else []), *messages[begin : answer + 1]]
            prompt = self.render(shown[:-1], generation_prompt=True)
            if not prompt.startswith(history):
                raise CoralError(
                    f"{conversation.where}: the chat template rewrites history (an answer is shown otherwise "
                    "at a later turn), so one row cannot hold every answer with what the target reads before "
                    "it; train on last answers only (--last-turn-only), or use a template that keeps history."
                )
            answered = self._answered(conversation.where, shown, prompt, changes)
            if self.end_text:
                before, end, _ = answered.partition(self.end_text)
                if not end:
                    raise BadRecordError("the chat template leaves out the end token of an answer")
                answered = before + end
            yield prompt[len(history) :], answered
            history = prompt + answered

    def _answered(self, where: str, shown: Sequence[Message], prompt: str, changes: list[str]) -> str:
        """What the target writes behind the prompt, with all that the template puts behind an answer."""
        content, full = shown[-1]["content"], self.render(shown)
        begins = full.startswith(prompt)
        if begins and content.strip() in self.prefill + full[len(prompt) :]:
            return full[len(prompt) :]
        if not begins and not self.prefill:
            raise CoralError(
                f"{where}: the chat template shows an answer without the generation prompt before it, so "
                "what the target writes cannot be told from what it reads; use a template whose "
                "add_generation_prompt adds exactly what precedes an answer."
            )
        changes.append(_OWN_TEXT)
        return self._less_prefill(content) + self.suffix

    def _less_prefill(self, content: str) -> str:
        """The part of an answer that the target writes behind the generation prompt."""
        if content.startswith(self.prefill):
            return content[len(self.prefill) :]
        prefill = self.prefill.strip()
        if prefill and content.lstrip().startswith(prefill):
            return content.lstrip()[len(prefill) :].lstrip()
        if (tag := re.search(r"<(\w+)>$", prefill)) and f"</{tag[1]}>" not in content:
            raise BadRecordError(
                f"the generation prompt begins an answer with {tag[0]}, and this one does not go on there"
            )
        return content


def refuse_template(tokenizer: Any) -> None:
    """Raise CoralError where no conversation can be rendered: no chat template, or several and no default."""
    name, template = tokenizer.name_or_path or "the tokenizer", tokenizer.chat_template
    if not template:
        raise CoralError(
            f"{name} has no chat template, so conversations cannot be rendered; use the chat (instruct) "
            "version of the target, or set tokenizer.chat_template and save it beside the target."
        )
    if isinstance(template, dict) and "default" not in template:
        raise CoralError(
            f"{name} has several chat templates ({', '.join(sorted(template))}) and none is the default; "
            "save the one to use as chat_template.jinja beside the target."
        )


def template_fault(error: Exception) -> str:
    """What a template says of messages that it does not render, in one line."""
    import jinja2

    said = " ".join(str(error).split()).rstrip(".")
    return said if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}, {said}"


def special_texts(tokenizer: Any) -> list[str]:
    """The special tokens as text."""
    added = tokenizer.added_tokens_decoder
    ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    return [text for text in tokenizer.convert_ids_to_tokens(sorted(ids)) if text]


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer in the chat template; None without one, or without a template."""
    try:
        return ChatFormat(tokenizer).end_id
    except CoralError:
        return None


def end_answers(target: Any) -> None:
    """Add the token that ends an answer in the chat template to the target's end tokens."""
    if target.tokenizer is not None and (end := end_of_turn(target.tokenizer)) is not None:
        target.eos_ids |= {end}
