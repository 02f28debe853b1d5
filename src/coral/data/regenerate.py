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

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from coral.data.account import Outcome, Regenerated
from coral.data.conversations import Dropped
from coral.data.jobs import Answer, Job, draw, jobs_of
from coral.data.sources import Source, listed, size
from coral.errors import CoralError
from coral.files import atomic_text
from coral.locks import locks_output
from coral.progress import bar, counted


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
    _refuse_request(sources, output, temperatures, (limit, max_turns))
    asked = {
        "sources": sources, "temperatures": list(temperatures), "limit": limit,
        "max_turns": max_turns, **settings,
    }  # fmt: skip
    total = size(sources)
    files = _Files(output)
    earlier = files.earlier(asked)
    result, begin = Regenerated(), time.monotonic()
    drawn: list[Job] | None = None
    if limit is not None:
        with bar(console, "drawing", total) as advance:
            every = jobs_of(sources, temperatures, max_turns, result.skipped)
            drawn = draw(counted(every, advance, result.skipped), limit, settings["seed"], result.skipped)
        total = len(drawn)

    def jobs(skipped: Dropped) -> Iterator[Job]:
        return jobs_of(sources, temperatures, max_turns, skipped) if drawn is None else iter(drawn)

    if earlier:
        _refuse_changed(output, earlier, jobs(Dropped()))
    todo = jobs(result.skipped)
    if (first := next(todo, None)) is None:
        raise _nothing_to_ask(result.skipped)
    shown = result.input if drawn is not None else 0  # of the records, on the bar
    files.save(asked)
    with bar(console, "regenerating", total) as advance:
        writer = _Writer(files, settings, result, begin, advance, shown)
        try:
            answer(_known(chain([first], todo), earlier), writer.finish)
            writer.show()  # records behind the last that was asked
        finally:  # also after Ctrl-C: what was finished is counted
            files.save(asked, result)
    return result


def _refuse_request(
    sources: Sequence[Source], output: Path, temperatures: Sequence[float], counts: Sequence[int | None]
) -> None:
    """Raise CoralError for what cannot be asked, before a source is read."""
    if not temperatures or not all(math.isfinite(each) and each >= 0 for each in temperatures):
        raise CoralError("temperatures must be one or more numbers of at least 0.")
    if any(n is not None and n < 1 for n in counts):
        raise CoralError("limit and max_turns must be at least 1.")
    if output.suffix != ".jsonl" or output.resolve() in {Path(source).resolve() for source in sources}:
        raise CoralError(f"{output} cannot be the output; choose a file of its own that ends in .jsonl.")
    if len({*sources}) < len(sources):
        raise CoralError("a source is named twice; name each once, for a record is known by its source.")


def _nothing_to_ask(skipped: Dropped) -> CoralError:
    return CoralError(
        "the sources hold no conversation to regenerate; name files with user turns"
        f"{f': {skipped}' if skipped.total else ''}."
    )


def _known(jobs: Iterator[Job], earlier: dict[str, Outcome]) -> Iterator[Job]:
    """The jobs, each with its outcome of an earlier run."""
    for job in jobs:
        job.before = earlier.pop(job.source, None)
        yield job


@dataclass
class _Writer:
    """Writes down each job that is through, counts it, and moves the bar.

    shown: how many records the bar has counted.
    """

    files: "_Files"
    settings: dict[str, Any]
    result: Regenerated
    begin: float
    advance: Callable[..., None]
    shown: int

    def finish(self, job: Job) -> None:
        _count(job, self.result)
        known = {"source": job.source, "digest": job.digest}
        if not job.before and job.answered:
            regenerated = {"temperature": job.temperature, **self.settings}
            record = {"messages": job.messages, **known, "regenerated": regenerated}
            _append(self.files.output, record)
        elif not job.before and job.asked and job.lasting:
            _append(self.files.failures, {**known, "problem": job.problem, "detail": job.detail})
        self.result.seconds = time.monotonic() - self.begin
        self.show()

    def show(self) -> None:
        self.advance(self.result.input - self.shown, note=self.result.speed)
        self.shown = self.result.input


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


@dataclass(frozen=True)
class _Files:
    """The output and what stands beside it, see the head of this file."""

    output: Path

    @property
    def failures(self) -> Path:
        return self.output.with_suffix(".failed.jsonl")

    @property
    def account(self) -> Path:
        return self.output.with_suffix(".account.json")

    def save(self, asked: dict[str, Any], result: Regenerated | None = None) -> None:
        """Write the account: what was asked for, and where the records went."""
        content = {"asked": asked, **(result.account() if result else {})}
        atomic_text(self.account, json.dumps(content, indent=2 if result else None) + "\n")

    def earlier(self, asked: dict[str, Any]) -> dict[str, Outcome]:
        """Where an earlier run of the same command left which record, by source.

        Raises:
            CoralError: what is there was written by something else, or with other sources or settings.
        """
        if not any(path.exists() and path.stat().st_size for path in (self.output, self.failures)):
            return {}  # whatever was asked, nothing was written
        if not self.account.exists():
            raise _foreign(self.output, f"there is no {self.account.name}")
        try:
            before = json.loads(self.account.read_text(encoding="utf-8"))["asked"]
            differing = [key for key in asked if before.get(key) != asked[key]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _foreign(self.output, f"{self.account.name} cannot be read") from error
        if differing:
            key = differing[0]
            raise _foreign(self.output, f"{key} was {before.get(key)!r} and is {asked[key]!r}")
        return _outcomes(self.output) | _outcomes(self.failures)


def _outcomes(path: Path) -> dict[str, Outcome]:
    """Where the records in one file of an earlier run went, by source."""
    found: dict[str, Outcome] = {}
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
