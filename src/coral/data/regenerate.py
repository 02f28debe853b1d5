"""Let the target rewrite the answers of conversations: a drafter learns best from what its target writes.

System and user turns are kept; the answer to each user turn is written after the answers already rewritten.
The output is conversations again, one JSON object a line, to be given to `prepare`:

    {"messages": [...], "source": "FILE:LINE", "regenerated": {"temperature", "seed", "max_new_tokens"}}

It holds text, not token ids, so any later tool can read it. An answer that did not end is marked
"finished": false, which keeps `prepare` from training an end token that the target never wrote.

The order of the output is fixed before anything is written: windows of the input, each sorted so that a
batch holds prompts of similar length. A run that was stopped goes on after the last whole line, and as an
answer is a function of (prompt, seed, sequence id) alone, the file ends up as if it had never been stopped.
"""

import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console

from coral.data.conversations import BadRecordError, ChatFormat, Dropped, Message, read
from coral.data.progress import bar
from coral.errors import CoralError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (prompts, temperatures, sequence ids) -> new token ids of each prompt, with the end token if it was written.
Write: TypeAlias = Callable[[list[list[int]], list[float], list[int]], list[list[int]]]

WINDOW = 16  # batches that are sorted by length together


@dataclass
class Job:
    """One conversation on its way: a turn moves from `users` to `messages` when it is asked, as `prompt`."""

    source: str
    sequence_id: int  # number of the record among those that can be read
    temperature: float
    users: list[Message]
    messages: list[Message]
    prompt: list[int] = field(default_factory=list)

    @property
    def answered(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)


@dataclass
class Regenerated:
    """Where every record of the input went: input = written + skipped + failed."""

    written: int = 0
    unfinished: int = 0  # of those written: their last answer did not end
    tokens: int = 0  # written by this run, as opposed to earlier ones that it went on from
    seconds: float = 0.0
    skipped: Dropped = field(default_factory=Dropped)  # nothing was asked
    failed: Dropped = field(default_factory=Dropped)  # asked, without a usable answer

    @property
    def input(self) -> int:
        return self.written + self.skipped.total + self.failed.total

    def __str__(self) -> str:
        """The summary as a person reads it."""
        speed = self.tokens / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.input:,} records = {self.written:,} written + {self.skipped.total:,} skipped "
            f"+ {self.failed.total:,} failed",
            f"{self.unfinished:,} of those written end with an unfinished answer",
            f"{self.tokens:,} tokens in {self.seconds:,.0f} s, {speed:,.0f} tokens/s",
        ]
        for name, dropped in (("skipped", self.skipped), ("failed", self.failed)):
            lines += [f"  {name}: {count:,} x {reason}" for reason, count in dropped.counts.most_common()]
            lines += [f"    {note}" for note in dropped.notes]
        return "\n".join(lines)


def regenerate(
    sources: Sequence[str | Path],
    output: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    write: Write,
    *,
    context_length: int,
    max_new_tokens: int = 512,
    temperatures: Sequence[float] = (0.0, 0.8),
    batch_size: int = 64,
    seed: int = 0,
    limit: int | None = None,
    max_turns: int | None = None,
    keep_unfinished: bool = True,
    console: Console | None = None,
) -> Regenerated:
    """Append regenerated conversations to `output` (`.jsonl`), going on where an earlier run was stopped.

    Record n is answered at `temperatures[n % len(temperatures)]`; at temperature 0 a record with the turns of
    an earlier one is skipped, for it would repeat it. `write` is to use `seed` and to stop each answer after
    `max_new_tokens`. `limit` takes that many records, drawn with `seed`. An unfinished answer ends its
    conversation; without `keep_unfinished` it is left out.

    Raises:
        CoralError: an unreadable source, nothing to ask, or an output written with other input or settings.
    """
    output = Path(output)
    if not temperatures or min(temperatures) < 0:
        raise CoralError("temperatures must be one or more numbers of at least 0.")
    if any(n is not None and n < 1 for n in (batch_size, max_new_tokens, limit, max_turns)):
        raise CoralError("batch_size, max_new_tokens, limit and max_turns must be at least 1.")
    if max_new_tokens >= context_length:
        raise CoralError(
            f"{max_new_tokens} new tokens leave no room for a prompt in a context of {context_length}; "
            "ask for fewer (--max-new-tokens)."
        )
    if output.suffix != ".jsonl" or output.resolve() in {Path(source).resolve() for source in sources}:
        raise CoralError(f"{output} cannot be the output; choose a file of its own that ends in .jsonl.")
    chat = ChatFormat(tokenizer)
    result = Regenerated()
    chosen = _choose(sources, temperatures, limit, seed, result.skipped)
    if not chosen:
        raise CoralError("the sources hold no conversation to regenerate; name .jsonl files with user turns.")
    settings = {"seed": seed, "max_new_tokens": max_new_tokens}
    longest = context_length - max_new_tokens
    done = deque(_whole_lines(output))
    jobs = _jobs(sources, chosen, temperatures, max_turns)
    begin = time.monotonic()
    with bar(console, "regenerating", len(chosen)) as advance:
        while window := list(islice(jobs, WINDOW * batch_size)):
            ready = [job for job in window if _ask(job, chat, longest, result.skipped)]
            ready.sort(key=lambda job: (len(job.users), len(job.prompt)))
            advance(len(window) - len(ready))
            for batch in (ready[i : i + batch_size] for i in range(0, len(ready), batch_size)):
                todo = [job for job in batch if not _was_done(job, done, settings, output)]
                result.tokens += _converse(todo, chat, write, longest, max_new_tokens, keep_unfinished)
                _append(output, [_record(job, settings) for job in todo if job.answered])
                for job in batch:
                    if job.answered:
                        result.written += 1
                        result.unfinished += "finished" in job.messages[-1]
                    else:
                        result.failed.add(job.source, "no usable answer")
                result.seconds = time.monotonic() - begin
                advance(len(batch), f"{result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s")
    if done:
        raise _foreign(output, done[0]["source"])
    return result


def _choose(
    sources: Sequence[str | Path],
    temperatures: Sequence[float],
    limit: int | None,
    seed: int,
    skipped: Dropped,
) -> set[int]:
    """Numbers of the records to ask, among those that can be read; all others are counted in `skipped`."""
    candidates: list[int] = []
    seen: set[int] = set()
    for index, conversation in enumerate(read(sources, skipped, prompts_only=True)):
        if temperatures[index % len(temperatures)] == 0:
            asked = hash(tuple(m["content"] for m in conversation.messages if m["role"] != "assistant"))
            if asked in seen:
                skipped.counts["same turns as an earlier record at temperature 0"] += 1
                continue
            seen.add(asked)
        candidates.append(index)
    if limit is None or limit >= len(candidates):
        return set(candidates)
    chosen = set(random.Random(seed).sample(candidates, limit))
    skipped.counts["beyond the limit (--limit)"] += len(candidates) - limit
    return chosen


def _jobs(
    sources: Sequence[str | Path], chosen: set[int], temperatures: Sequence[float], max_turns: int | None
) -> Iterator[Job]:
    for index, conversation in enumerate(read(sources, Dropped(keep=0), prompts_only=True)):
        if index in chosen:
            users = [message for message in conversation.messages if message["role"] == "user"]
            system = [message for message in conversation.messages if message["role"] == "system"]
            yield Job(
                conversation.where, index, temperatures[index % len(temperatures)], users[:max_turns], system
            )


def _ask(job: Job, chat: ChatFormat, longest: int, skipped: Dropped) -> bool:
    """Move the next user turn into the prompt of at most `longest` tokens, or leave the job as it was."""
    messages = [*job.messages, job.users[0]]
    try:
        prompt = chat.prompt(messages)
        if len(prompt) > longest:
            raise BadRecordError("the prompt and the longest answer do not fit into the context together")
    except BadRecordError as error:
        skipped.add(job.source, str(error))
        return False
    job.users, job.messages, job.prompt = job.users[1:], messages, prompt
    return True


def _converse(
    jobs: list[Job], chat: ChatFormat, write: Write, longest: int, max_new_tokens: int, keep_unfinished: bool
) -> int:
    """Answer turn after turn, until no job has another turn that can be asked; returns the tokens written.

    A conversation ends early, with the answers it has, at an answer that is empty or unfinished and at a
    prompt that has become too long.
    """
    tokens = 0
    while jobs:
        answers = write(
            [j.prompt for j in jobs], [j.temperature for j in jobs], [j.sequence_id for j in jobs]
        )
        going_on = []
        for job, ids in zip(jobs, answers, strict=True):
            tokens += len(ids)
            text, finished = read_answer(ids, chat, max_new_tokens)
            if not text.strip() or not (finished or keep_unfinished):
                job.messages.pop()  # the user turn that has no answer
                continue
            answer: Message = {"role": "assistant", "content": text}
            job.messages.append(answer if finished else answer | {"finished": False})
            if finished and job.users and _ask(job, chat, longest, Dropped(keep=0)):
                going_on.append(job)
        jobs = going_on
    return tokens


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


def _record(job: Job, settings: dict[str, int]) -> dict[str, Any]:
    regenerated = {"temperature": job.temperature, **settings}
    return {"messages": job.messages, "source": job.source, "regenerated": regenerated}


def _append(output: Path, records: list[dict[str, Any]]) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    except OSError as error:
        raise CoralError(
            f"cannot write {output}: {error.strerror}; free some space and run the same command to go on."
        ) from error


def _whole_lines(output: Path) -> list[dict[str, Any]]:
    """Records that an earlier run left in `output`; a last line that was torn is cut off the file."""
    if not output.exists():
        return []
    try:
        with output.open("rb+") as file:
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                file.truncate(sum(map(len, lines[:-1])))
                lines.pop()
    except OSError as error:
        raise CoralError(f"cannot go on with {output}: {error.strerror}; choose another output.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({key: record[key] for key in ("messages", "source", "regenerated")})
        except (ValueError, KeyError, TypeError) as error:
            raise _foreign(output, f"line {number}") from error
    return records


def _was_done(job: Job, done: deque[dict[str, Any]], settings: dict[str, int], output: Path) -> bool:
    """Whether an earlier run dealt with the job; `done` is what is left of its output, in the order of jobs.

    A job that the output passes over before its last line got no usable answer.
    """
    if not done:
        return False
    if done[0]["source"] != job.source:
        job.messages.pop()
        return True
    record = done.popleft()
    job.messages = record["messages"]
    if record != _record(job, settings):
        raise _foreign(output, job.source)
    return True


def _foreign(output: Path, where: str) -> CoralError:
    return CoralError(
        f"{output} was written with other sources or settings ({where} differs), so this run cannot go on "
        "with it; use the same ones, or choose another output."
    )
