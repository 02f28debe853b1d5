"""What a person sees while a command loads, fetches or builds: a spinner or a bar on standard error.

Where standard error is no terminal only steps that take long are said, each in a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.status import Status

_shown: Status | None = None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner beside `what`, until the block ends; inside another one only its words change."""
    global _shown
    console = Console(stderr=True)
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
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"{what} ...", markup=False)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `show(done)`, which moves a bar in bytes to `done` of `total`."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
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
