"""One progress bar for the long jobs over data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def bar(console: Console | None, title: str, total: int) -> Iterator[Callable[..., None]]:
    """Yield `advance(count=1, note="")`; without a console nothing is drawn."""
    if console is None:
        yield lambda count=1, note="": None
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
