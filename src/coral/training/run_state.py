"""The state of a run on disk, inside the drafter's own directory, so that both are replaced in one step.

    OUTPUT/                 a drafter, at every moment (see drafters/checkpoint.py)
    OUTPUT/coral/training/  state.pt (optimiser, position, clock) and metrics.jsonl

There is no random state to keep: every draw is a function of the seed and of the number of the update.
"""

import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import TypedDict

from coral import json_file
from coral.drafters import checkpoint
from coral.errors import CoralError
from coral.files import atomic_directory, unreadable
from coral.json_file import OPEN, Count, Seconds, Size
from coral.target.record import TargetRecord
from coral.training.recipe import TrainConfig

MAY_CHANGE = {"limits", "reports", "checkpoint_steps", "head_chunk", "accumulate"}
"""Keys that may differ when a run goes on: every update stays what it was, but for rounding with some. The
product of `accumulate` with the number of processes must stay."""


@dataclass
class RunState:
    """Where a run stands; the data position follows from `update`."""

    update: int = 0
    seconds: float = 0.0
    skipped: int = 0
    acceptance: dict[str, Any] = field(default_factory=dict)
    processes: int = 1


class _State(TypedDict):
    update: Count
    seconds: Seconds
    skipped: Count
    acceptance: dict[str, Any]
    processes: Size


class _Config(TypedDict):
    accumulate: Size


class _Optimiser(TypedDict):
    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class _Stored(TypedDict):
    """What state.pt holds; `_Config` may hold any key."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    state: _State
    config: _Config
    optimiser: list[_Optimiser]
    examples: Count


def random_generator(seed: int, *place: int) -> torch.Generator:
    """A CPU generator that is a function of the seed and of where it is used."""
    mixed = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def folder(output: Path) -> Path:
    return output / "coral" / "training"


def save(
    output: Path,
    drafter: Any,
    target: TargetRecord,
    config: TrainConfig,
    optimiser: list[dict[str, Any]],
    state: RunState,
    examples: int,
    digest: str,
) -> None:
    """Write drafter and state as `output`, in one step, beside what others put there.

    Raises:
        CoralError: a weight is not finite, or the disk refuses.
    """
    buffer = io.BytesIO()  # torch.save hides the reason of a failed write
    torch.save(
        {
            "state": asdict(state),
            "config": asdict(config),
            "optimiser": optimiser,
            "examples": examples,
            "digest": digest,
        },
        buffer,
    )
    metrics = folder(output) / "metrics.jsonl"
    goes_on = state.update > 0 and metrics.exists()
    with atomic_directory(output, ours=checkpoint.replaced(output, target)) as aside:
        reported = {"updates": state.update, "seconds": round(state.seconds), "acceptance": state.acceptance}
        checkpoint.write(drafter, aside, target=target, recipe=asdict(config), metrics=reported)
        folder(aside).mkdir()
        (folder(aside) / "state.pt").write_bytes(buffer.getvalue())
        (folder(aside) / "metrics.jsonl").write_bytes(metrics.read_bytes() if goes_on else b"")


def load(
    output: Path, config: TrainConfig, examples: int, digest: str, processes: int = 1
) -> tuple[RunState, list[dict[str, Any]]]:
    """The state of the run in `output`, for it to go on in so many processes, and its optimiser's.

    Raises:
        CoralError: no state there, or the run was started with another configuration, other data, or
            another number of batches in an update.
    """
    path = folder(output) / "state.pt"
    elsewhere = "choose another output directory."
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CoralError(f"{output} holds a drafter but no training state; {elsewhere}") from error
    except Exception as error:
        raise CoralError(f"{path} cannot be read ({unreadable(error)}); {elsewhere}") from error
    stored: Any = json_file.check(found, _Stored, str(path), elsewhere)
    state = RunState(**stored["state"])
    if changed := _changed(stored["config"], asdict(config)):
        key, old, new = changed
        raise CoralError(
            f"the run in {output} was started with {key}={old!r}, now it is {new!r}; use the old value, or "
            "choose another output directory."
        )
    if stored["examples"] != examples:
        raise CoralError(
            f"the run in {output} was started on {stored['examples']} rows of data, now there are "
            f"{examples}; use the old data, or choose another output directory."
        )
    if stored.get("digest", digest) != digest:  # absent from states of before it was kept
        raise CoralError(
            f"the run in {output} was started on other data of as many rows; use the old data, or choose "
            "another output directory."
        )
    before = state.processes * stored["config"]["accumulate"]
    if before != processes * config.accumulate:
        fitting = f"accumulate={before // processes}" if before % processes == 0 else "another number of them"
        raise CoralError(
            f"the run in {output} was started with {before} batches in an update, but {processes} processes "
            f"with accumulate={config.accumulate} have {processes * config.accumulate}; use {fitting}, or "
            "choose another output directory."
        )
    return replace(state, processes=processes), stored["optimiser"]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM arrives; the update in work is finished first."""
    received: list[int] = []
    try:
        old = {
            number: signal.signal(number, lambda number, frame: received.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread, which alone receives signals
        old = {}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _changed(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first key whose value differs, with both values."""
    for key in sorted(before.keys() | now.keys()):
        if not prefix and key in MAY_CHANGE:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := _changed(old, new, f"{prefix}{key}."):
                return inner
        elif old != new:
            return f"{prefix}{key}", old, new
    return None
