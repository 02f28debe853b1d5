"""Training answers written in this process, by `coral.serving.engine` or `coral.decoding.batch`.

An answer is a function of (prompt, seed, sequence id) alone, so a run that was stopped ends with the records
of one that was not.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from coral.data.chat_format import ChatFormat
from coral.data.conversations import BadRecordError
from coral.data.jobs import Answer, Job
from coral.errors import CoralError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text(Protocol):
    """A text that is being written; `written` are the new ids, with the end token if there was one."""

    @property
    def written(self) -> list[int]: ...


T = TypeVar("T", bound=Text)
# (prompts, temperatures, sequence ids) -> new token ids of each prompt, with the end token if it was written.
WritePadded: TypeAlias = Callable[[list[list[int]], list[float], list[int]], list[list[int]]]

WINDOW = 16  # batches that are sorted by length together


class Turns:
    """The turns of conversations as prompts, and what the target wrote as their answers.

    Each answer ends after `max_new_tokens`. Without `keep_unfinished` one that did not end is left out.

    Raises:
        CoralError: a number out of range, or a tokenizer without a usable chat template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context_length: int,
        max_new_tokens: int,
        keep_unfinished: bool = True,
    ) -> None:
        if max_new_tokens < 1:
            raise CoralError("max_new_tokens must be at least 1.")
        if max_new_tokens >= context_length:
            raise CoralError(
                f"{max_new_tokens} new tokens leave no room for a prompt in a context of {context_length}; "
                "ask for fewer (--max-new-tokens)."
            )
        self.chat, self.longest = ChatFormat(tokenizer), context_length - max_new_tokens
        self.max_new_tokens, self.keep_unfinished = max_new_tokens, keep_unfinished

    def ask(self, job: Job) -> list[int] | None:
        """Move the next user turn into the prompt, or leave the job as it was if that cannot be asked."""
        messages = [*job.messages, job.users[0]]
        try:
            ids = self.chat.prompt(messages)
            if len(ids) > self.longest:
                raise BadRecordError("the prompt and the longest answer do not fit into the context together")
        except BadRecordError as error:
            if not job.asked:
                job.problem = str(error)
            return None
        job.users, job.messages, job.asked = job.users[1:], messages, True
        return ids

    def take(self, job: Job, ids: list[int]) -> list[int] | None:
        """Add the answer that was written, and return the next turn's prompt, if there is one to ask."""
        job.tokens += len(ids)
        going_on = job.take(*read_answer(ids, self.chat, self.max_new_tokens), self.keep_unfinished)
        return self.ask(job) if going_on else None


def answer_packed(
    turns: Turns,
    begin: Callable[[list[int], float, int], T],
    write: Callable[[Callable[[], T | None]], Iterator[T]],
) -> Answer:
    """Answers from `write`, which takes the next text as soon as one has ended and yields those that have.

    `begin` makes a text of (prompt, temperature, sequence id). What `write` is given returns None while there
    is no text to begin.
    """

    def answer(jobs: Iterator[Job], finish: Callable[[Job], None]) -> None:
        prompts: deque[tuple[Job, list[int]]] = deque()  # of later turns
        running: dict[int, tuple[Job, T]] = {}

        def admit() -> T | None:
            while not prompts:
                if (job := next(jobs, None)) is None:
                    return None
                if not job.before and (ids := turns.ask(job)):
                    prompts.append((job, ids))
                else:
                    finish(job)
            job, ids = prompts.popleft()
            text = begin(ids, job.temperature, job.sequence_id)
            running[id(text)] = job, text
            return text

        for text in write(admit):
            job, _ = running.pop(id(text))
            if ids := turns.take(job, text.written):
                prompts.append((job, ids))
            else:
                finish(job)

    return answer


def answer_padded(turns: Turns, write: WritePadded, batch_size: int) -> Answer:
    """Answers from `write` in batches of prompts of similar length.

    The order is fixed before anything is written: windows of the input, each sorted by length.

    Raises:
        CoralError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise CoralError("batch_size must be at least 1.")

    def converse(asked: list[tuple[Job, list[int]]]) -> None:
        """Answer turn after turn, until no job has another turn that can be asked."""
        while asked:
            jobs = [job for job, _ in asked]
            written = write(
                [ids for _, ids in asked], [j.temperature for j in jobs], [j.sequence_id for j in jobs]
            )
            following = [(job, turns.take(job, ids)) for job, ids in zip(jobs, written, strict=True)]
            asked = [(job, ids) for job, ids in following if ids]

    def answer(jobs: Iterator[Job], finish: Callable[[Job], None]) -> None:
        while window := list(islice(jobs, WINDOW * batch_size)):
            asked = []
            for job in window:
                if ids := turns.ask(job):
                    asked.append((job, ids))
                else:
                    finish(job)
            asked.sort(key=lambda each: (len(each[0].users), len(each[1])))
            for batch in (asked[i : i + batch_size] for i in range(0, len(asked), batch_size)):
                converse([(job, ids) for job, ids in batch if not job.before])
                for job, _ in batch:
                    finish(job)

    return answer


def read_answer(ids: list[int], chat: ChatFormat, max_new_tokens: int) -> tuple[str, bool]:
    """Content of a written answer, and whether the target ended it as the template would.

    Any special token ends the content, for none can be stored as text; only the template's own end token
    makes it finished. Where the template has none, an answer of less than `max_new_tokens` is finished.
    """
    length = next((t for t, token in enumerate(ids) if token in chat.special_ids), len(ids))
    if chat.end_id is None:
        finished = len(ids) < max_new_tokens
    else:
        finished = length < len(ids) and ids[length] == chat.end_id
    text = chat.tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    # A cut may fall inside a character, and the template will write its own closing text again.
    return (text.removesuffix(chat.closing), True) if finished else (text.rstrip("\ufffd"), False)
