"""One progress bar for the long jobs over data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")

LINE_SECONDS = 60.0


@contextmanager
def bar(console: Console | None, title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Yield `advance(count=1, note="")`; without a console nothing is drawn, without a total no end is.

    In a log, which has no use for a bar, it is a line a minute.
    """
    if console is None:
        yield lambda count=1, note="": None
        return
    if not console.is_terminal:
        yield _lines(console, title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console
    ) as shown:
        task = shown.add_task(title, total=total, note="")

        def advance(count: int = 1, note: str = "") -> None:
            shown.update(task, advance=count, note=note)

        yield advance


def _lines(console: Console, title: str, total: int | None) -> Callable[..., None]:
    done, said = 0, monotonic()

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, said
        done += count
        if monotonic() - said < LINE_SECONDS and (done != total or not count):
            return
        said = monotonic()
        end = "" if total is None else f" of {total:,}"
        console.print(f"{title} {done:,}{end} {note}".rstrip(), highlight=False, soft_wrap=True)

    return advance


class Reading(Protocol):
    """What counts the records that a source has given."""

    read: int


def counted(
    items: Iterable[Item], advance: Callable[..., None], reading: Reading | None = None
) -> Iterator[Item]:
    """The items, each moving the bar on when it is taken: by one, or to where `reading` is, so that records
    of which no item came are counted, too.
    """
    shown = 0
    for item in items:
        now = reading.read if reading else shown + 1
        advance(now - shown)
        shown = now
        yield item
    if reading:
        advance(reading.read - shown)
