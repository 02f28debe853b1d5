"""Let the target rewrite the answers of conversations: a drafter learns best from what its target writes.

System and user turns are kept; the answer to each user turn is written after the answers already rewritten.
The output is conversations again, one JSON object a line, to be given to `prepare`:

    {"messages": [...], "source": "FILE:LINE", "digest": "...",
     "regenerated": {"temperature", "seed", "max_new_tokens"}}

It holds text, not token ids, so any later tool can read it. An answer that did not end is marked
"finished": false, which keeps `prepare` from training an end token that the target never wrote.

Who answers is an argument: a target in this process (`coral.data.batches`) or servers elsewhere
(`coral.data.endpoint`). A record is known by its source, and beside OUTPUT.jsonl stand OUTPUT.failed.jsonl,
the records that have no usable answer and would get none if they were asked again, and OUTPUT.account.json:
what was asked for, and where every record went. So a run that was stopped goes on with what is not there,
after it has read the sources once to see by the digests that each still holds what was asked.
"""

import hashlib
import heapq
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from coral.data.account import Outcome, Regenerated
from coral.data.conversations import Dropped, Message, read
from coral.data.sources import Source, listed, size
from coral.errors import CoralError
from coral.files import atomic_text
from coral.locks import locks_output
from coral.progress import bar, counted


@dataclass
class Job:
    """One conversation on its way: a turn moves from `users` to `messages` when it is asked."""

    source: str
    sequence_id: int  # number of the record among those that can be read
    temperature: float
    users: list[Message]
    messages: list[Message]
    digest: str = ""  # of the turns that are to be asked
    asked: bool = False
    tokens: int = 0  # written for it
    problem: str = "no usable answer"  # why, if nothing was answered: the same for all with the same fault
    detail: str = ""  # what only this one has to say of it
    lasting: bool = True  # asking again would end in the same way
    before: Outcome | None = None  # of an earlier run; then nothing is asked

    @property
    def answered(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)

    @property
    def outcome(self) -> Outcome:
        if self.before:
            return self.before
        if self.answered:
            return Outcome(unfinished="finished" in self.messages[-1])
        return Outcome(problem=self.problem, detail=self.detail)

    def take(self, text: str, finished: bool, keep_unfinished: bool) -> bool:
        """Add the answer to the last turn asked; returns whether the next turn is to be asked.

        A conversation ends with the answers it has at one that is empty, or unfinished.
        """
        if not text.strip() or not (finished or keep_unfinished):
            self.messages.pop()  # the user turn that has no answer
            return False
        answer: Message = {"role": "assistant", "content": text}
        self.messages.append(answer if finished else answer | {"finished": False})
        return finished and bool(self.users)


# Asks the turns of the jobs and hands each job to the second argument, in any order, once it is through.
Answer: TypeAlias = Callable[[Iterator[Job], Callable[[Job], None]], None]


@locks_output
def regenerate(
    sources: Source | Sequence[Source],
    output: str | Path,
    answer: Answer,
    *,
    settings: dict[str, Any],
    temperatures: float | Sequence[float] = (0.0, 0.8),
    limit: int | None = None,
    max_turns: int | None = None,
    console: Console | None = None,
) -> Regenerated:
    """Append regenerated conversations to `output` (`.jsonl`), going on where an earlier run was stopped.

    Record n is answered at `temperatures[n % len(temperatures)]`; at temperature 0 a record with the turns of
    an earlier one is skipped, for it would repeat it. `settings` (a "seed" among them) are what else decides
    the answers, and are kept with each record. `limit` takes that many records, drawn with the seed, which
    stand in memory together; without it memory holds a digest of each record and nothing more.

    Raises:
        CoralError: an unreadable source, nothing to ask, an output written with other input or settings, or
            one that another process writes.
    """
    output, sources = Path(output), listed(sources)
    temperatures = [temperatures] if isinstance(temperatures, int | float) else list(temperatures)
    if not temperatures or not all(math.isfinite(each) and each >= 0 for each in temperatures):
        raise CoralError("temperatures must be one or more numbers of at least 0.")
    if any(n is not None and n < 1 for n in (limit, max_turns)):
        raise CoralError("limit and max_turns must be at least 1.")
    if output.suffix != ".jsonl" or output.resolve() in {Path(source).resolve() for source in sources}:
        raise CoralError(f"{output} cannot be the output; choose a file of its own that ends in .jsonl.")
    if len({*sources}) < len(sources):
        raise CoralError("a source is named twice; name each once, for a record is known by its source.")
    total = size(sources)
    asked = {
        "sources": sources, "temperatures": list(temperatures), "limit": limit,
        "max_turns": max_turns, **settings,
    }  # fmt: skip
    failures, account = output.with_suffix(".failed.jsonl"), output.with_suffix(".account.json")
    earlier = _earlier(output, failures, account, asked)
    result, begin = Regenerated(), time.monotonic()
    jobs = _jobs(sources, temperatures, max_turns, result.skipped)
    drawn: list[Job] | None = None
    if limit is not None:
        with bar(console, "drawing", total) as advance:
            drawn = _draw(counted(jobs, advance, result.skipped), limit, settings["seed"], result.skipped)
        jobs, total = iter(drawn), len(drawn)
    if earlier:
        now = _jobs(sources, temperatures, max_turns, Dropped()) if drawn is None else iter(drawn)
        _refuse_changed(output, earlier, now)
    if (first := next(jobs, None)) is None:
        raise CoralError(
            "the sources hold no conversation to regenerate; name files with user turns"
            f"{f': {result.skipped}' if result.skipped.total else ''}."
        )
    shown = result.input if drawn is not None else 0  # of the records, on the bar
    atomic_text(account, json.dumps({"asked": asked}) + "\n")

    def begun() -> Iterator[Job]:
        for job in chain([first], jobs):
            job.before = earlier.pop(job.source, None)
            yield job

    with bar(console, "regenerating", total) as advance:

        def finish(job: Job) -> None:
            nonlocal shown
            _count(job, result)
            regenerated = {"temperature": job.temperature, **settings}
            if not job.before and job.answered:
                record = {"messages": job.messages, "source": job.source, "digest": job.digest}
                _append(output, {**record, "regenerated": regenerated})
            elif not job.before and job.asked and job.lasting:
                known = {"source": job.source, "digest": job.digest}
                _append(failures, {**known, "problem": job.problem, "detail": job.detail})
            result.seconds = time.monotonic() - begin
            advance(result.input - shown, note=result.speed)
            shown = result.input

        try:
            answer(begun(), finish)
            advance(result.input - shown, note=result.speed)  # records behind the last that was asked
        finally:  # also after Ctrl-C: what was finished is counted
            atomic_text(account, json.dumps({"asked": asked, **result.account()}, indent=2) + "\n")
    return result


def _jobs(
    sources: Sequence[Source], temperatures: Sequence[float], max_turns: int | None, skipped: Dropped
) -> Iterator[Job]:
    """One job for each record that can be read and does not repeat another; the rest goes to `skipped`."""
    seen: set[int] = set()
    for index, conversation in enumerate(read(sources, skipped, prompts_only=True)):
        temperature = temperatures[index % len(temperatures)]
        if temperature == 0:
            turns = hash(tuple(m["content"] for m in conversation.messages if m["role"] != "assistant"))
            if turns in seen:
                skipped.counts["same turns as an earlier record at temperature 0"] += 1
                continue
            seen.add(turns)
        users = [message for message in conversation.messages if message["role"] == "user"][:max_turns]
        system = [message for message in conversation.messages if message["role"] == "system"]
        said = json.dumps([[message["role"], message["content"]] for message in (*system, *users)])
        digest = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
        yield Job(conversation.where, index, temperature, users, system, digest)


def _draw(jobs: Iterator[Job], count: int, seed: int, skipped: Dropped) -> list[Job]:
    """`count` of the jobs, drawn evenly in one pass: those with the smallest digests."""
    seen = 0

    def digest(job: Job) -> bytes:
        nonlocal seen
        seen += 1
        return hashlib.blake2b(f"{seed} {job.source}".encode(), digest_size=12).digest()

    drawn = heapq.nsmallest(count, jobs, key=digest)
    if seen > count:
        skipped.counts["beyond the limit (--limit)"] += seen - count
    return drawn


def _count(job: Job, result: Regenerated) -> None:
    outcome = job.outcome
    result.tokens += job.tokens
    if not outcome.problem:
        result.written += 1
        result.answered += job.before is None
        result.unfinished += outcome.unfinished
    elif job.asked or job.before:
        result.failed.add(job.source, outcome.problem, outcome.detail)
        result.again += not (job.before or job.lasting)
    else:
        result.skipped.add(job.source, outcome.problem, outcome.detail)


def _append(path: Path, record: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise CoralError(
            f"cannot write {path}: {error.strerror}; free some space and run the same command to go on."
        ) from error


def _earlier(output: Path, failures: Path, account: Path, asked: dict[str, Any]) -> dict[str, Outcome]:
    """Where an earlier run of the same command left which record, by source.

    Raises:
        CoralError: what is there was written by something else, or with other sources or settings.
    """
    if not account.exists():
        if output.exists() and output.stat().st_size:
            raise _foreign(output, f"there is no {account.name}")
        return {}
    try:
        before = json.loads(account.read_text(encoding="utf-8"))["asked"]
        differing = [key for key in asked if before.get(key) != asked[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _foreign(output, f"{account.name} cannot be read") from error
    if differing:
        key = differing[0]
        raise _foreign(output, f"{key} was {before.get(key)!r} and is {asked[key]!r}")
    found: dict[str, Outcome] = {}
    for path in (output, failures):
        for number, line in enumerate(_whole_lines(path), start=1):
            try:
                record = json.loads(line)
                unfinished = "messages" in record and "finished" in record["messages"][-1]
                said = (str(record.get(name, "")) for name in ("problem", "detail", "digest"))
                found[record["source"]] = Outcome(unfinished, *said)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                raise _foreign(path, f"line {number}") from error
    return found


def _refuse_changed(output: Path, earlier: dict[str, Outcome], now: Iterator[Job]) -> None:
    """Raise CoralError unless the sources still hold every record that was asked, each in its place."""
    unseen = set(earlier)
    for job in now:
        if not unseen:
            return
        if job.source in unseen and earlier[job.source].digest not in (job.digest, ""):
            raise _foreign(output, f"{job.source} holds another conversation than was asked")
        unseen.discard(job.source)
    if unseen:
        raise _foreign(
            output, f"{len(unseen)} records that were asked are no longer there, {min(unseen)} for one"
        )


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Lines that an earlier run left; a last one that was torn is cut off the file."""
    if not path.exists():
        return
    try:
        with path.open("rb+") as file:
            whole = 0
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(whole)
                    return
                whole += len(line)
                yield line
    except OSError as error:
        raise CoralError(f"cannot go on with {path}: {error.strerror}; choose another output.") from error


def _foreign(output: Path, why: str) -> CoralError:
    return CoralError(
        f"{output} was written with other sources or settings ({why}), so this run cannot go on with it; "
        "use the same ones, or choose another output."
    )
