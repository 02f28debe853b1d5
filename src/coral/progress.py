"""What a person sees while a command loads, builds or goes through data, on standard error.

Three words: `spinner` for a block whose end is unknown, `step` for what it does now, `bar` for counted work.
Where standard error is no terminal, a step that takes long and a bar are lines of a log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn
    from rich.status import Status

Item = TypeVar("Item")

LINE_SECONDS = 60.0
"""Seconds between two lines of a bar in a log."""

_shown: Status | None = None


def _stderr() -> Console:
    from rich.console import Console  # not above: `coral --help` draws nothing

    return Console(stderr=True)


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """A spinner beside `what`, until the block ends; inside another one only its words change."""
    global _shown
    console = _stderr()
    if _shown is not None or not console.is_terminal:
        step(what)
        yield
        return
    with console.status(f"{what} ...") as _shown:
        try:
            yield
        finally:
            _shown = None


def step(what: str, long: bool = False) -> None:
    """Say what is done now: beside the spinner, if there is one.

    Args:
        long: it takes so long that without a spinner a line is due.
    """
    if _shown is not None:
        _shown.update(f"{what} ...")
    elif long:
        _stderr().print(f"{what} ...", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def byte_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `show(done)`, which moves a bar in bytes to `done` of `total`."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = _stderr()
    if not console.is_terminal:
        step(what, long=True)
        yield lambda done: None
        return
    if _shown is not None:  # a terminal has room for one moving thing
        _shown.stop()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.update(task, completed=done)
    finally:
        if _shown is not None:
            _shown.start()


@contextmanager
def bar(console: Console | None, what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Yields `advance(count=1, note="")`. Without a console nothing is drawn, without a total no end is.

    In a log, which has no use for a bar, it is a line a minute.
    """
    if console is None:
        yield lambda count=1, note="": None
        return
    if not console.is_terminal:
        yield _lines(console, what, total)
        return
    from rich.progress import Progress

    with Progress(*_columns(), console=console) as shown:
        task = shown.add_task(what, total=total, note="")

        def advance(count: int = 1, note: str = "") -> None:
            shown.update(task, advance=count, note=note)

        yield advance


def _columns() -> Iterator[ProgressColumn | str]:
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

    yield from ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[note]}")
    yield from (TimeElapsedColumn(), "ETA", TimeRemainingColumn())


def _lines(console: Console, what: str, total: int | None) -> Callable[..., None]:
    done, said = 0, monotonic()

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, said
        done += count
        if monotonic() - said < LINE_SECONDS and (done != total or not count):
            return
        said = monotonic()
        end = "" if total is None else f" of {total:,}"
        console.print(f"{what} {done:,}{end} {note}".rstrip(), highlight=False, soft_wrap=True)

    return advance


class Reading(Protocol):
    """What counts the records that a source has given."""

    read: int


def counted(
    items: Iterable[Item], advance: Callable[..., None], reading: Reading | None = None
) -> Iterator[Item]:
    """The items; each moves the bar on when it is taken.

    Args:
        reading: moves the bar to where it is, so that records of which no item came are counted, too.
    """
    shown = 0
    for item in items:
        now = reading.read if reading else shown + 1
        advance(now - shown)
        shown = now
        yield item
    if reading:
        advance(reading.read - shown)
