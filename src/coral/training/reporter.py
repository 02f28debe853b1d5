"""What a person sees of a run: a live bar on a terminal, plain lines anywhere else, and metrics.jsonl."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from coral import json_file
from coral.errors import CoralError
from coral.files import atomic_bytes
from coral.training.run_state import folder


class Reporter:
    """Averages the sums of several updates into one line of metrics, shows it, and hands it to `track`. Mute
    in all but one process.
    """

    def __init__(
        self,
        output: Path,
        mute: bool,
        console: Console | None = None,
        track: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.path = folder(output) / "metrics.jsonl"
        self.mute, self.track = mute, track
        self.console = console or Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=mute or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=1.0)
        self.sums: dict[str, Tensor] = {}
        self.loss = 0.0
        self.since = time.monotonic()
        self.expected = False

    def __enter__(self) -> "Reporter":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def say(self, message: str) -> None:
        if not self.mute:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def forget_after(self, update: int) -> None:
        """Drop the lines of a run that went on after its last checkpoint: they will be written again. Lines
        that are damaged go too, which is said, for they stop nobody from going on.
        """
        if self.mute or not self.path.exists():
            return
        *lines, torn = self.path.read_bytes().split(b"\n")  # a full disk may have torn the last one
        updates = [_update(line) for line in lines]
        kept = [line for line, n in zip(lines, updates, strict=True) if n is not None and n <= update]
        if bad := updates.count(None):
            self.say(f"{bad} damaged lines of {self.path} are left out")
        if kept != [*lines, *([torn] if torn else [])]:
            atomic_bytes(self.path, b"".join(line + b"\n" for line in kept))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work in here is not training: its time does not count in the speed."""
        begin = time.monotonic()
        yield
        self.since += time.monotonic() - begin

    def show(self, doing: str, fraction: float) -> None:
        """Show on the bar what goes on, when `fraction` of the run is done."""
        self.bar.update(self.task, description=doing, completed=fraction)

    def add(self, update: int, fraction: float, loss: float, sums: dict[str, Tensor]) -> None:
        """Count one update: its summed loss and the sums of `Outcome`, over all processes."""
        self.bar.update(self.task, completed=fraction)
        if not self.expected:  # nothing was averaged yet
            self.show(f"update {update}", fraction)
        self.loss += loss
        self.sums = {name: part + self.sums.get(name, 0) for name, part in sums.items()}

    def log(self, update: int, fraction: float, **more: Any) -> None:
        """Write the average since the last call to metrics.jsonl, and show it."""
        if not self.sums:
            return
        counts = self.sums.pop("rows")
        rows = counts.clamp(min=1)
        average = {name: _average(part, rows) for name, part in self.sums.items()}
        elapsed = time.monotonic() - self.since
        speed = rows[0].item() / max(elapsed, 1e-9)
        line = {
            "update": update,
            "progress": round(fraction, 5),
            "loss": self.loss / rows[0].item(),
            "accuracy": average.pop("correct"),
            **average,
            "trained_tokens_per_second": round(speed, 1),
            "memory_bytes": _memory(),
            **more,
        }
        self.write(line)
        learnt = zip(line["accuracy"], counts.tolist(), strict=True)
        accuracy = " ".join(f"{x:.1%}" for x, count in learnt if count)
        text = (
            f"update {update}  loss {line['loss']:.4f}  top-1 {accuracy}  {speed:,.0f} trained tokens/s  "
            f"{line['memory_bytes'] / 2**30:.1f} GiB"
        )
        self.show(text, fraction)
        if not self.console.is_terminal:
            left = elapsed_text(more["seconds"] * (1 / fraction - 1)) if fraction else "?"
            self.say(f"{fraction:4.0%}  {text}  {left} left")
        if fraction and not self.expected:
            left = more["seconds"] * (1 / fraction - 1)
            self.say(f"at this pace, {speed:,.0f} trained tokens/s, it ends in {elapsed_text(left)}")
            self.expected = True
        self.loss, self.sums, self.since = 0.0, {}, time.monotonic()

    def write(self, line: dict[str, Any]) -> None:
        if not self.mute:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.track is not None:
                self.track(line)


def _average(sums: Tensor, rows: Tensor) -> list[float] | float:
    """The mean over the rows [S] of each draft step, or of step 1 for a scalar."""
    if sums.dim() == 0:
        return round((sums / rows[0]).item(), 5)
    return [round(x, 5) for x in (sums / rows).tolist()]


def _update(line: bytes) -> int | None:
    """The update that a line of metrics is about, if it can be read."""
    try:
        update = json_file.parse(line, dict, "", "").get("update")
    except CoralError:
        return None
    return update if type(update) is int else None


def elapsed_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _memory() -> int:
    """Peak memory of this process: the accelerator's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
