"""Experiment trackers: where a run's configuration and metrics go beside metrics.jsonl."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from coral.errors import CoralError

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "coral"
"""The project that runs are filed under in wandb and trackio."""


def make(name: str, output: Path) -> list[GeneralTracker]:
    """The trackers that `name` stands for: one of `TRACKERS`, "all" of those installed, or "none".

    A run has the name of its output directory; TensorBoard's files stand beside that, in `tensorboard/`.

    Raises:
        CoralError: the tracker is not installed, or with "all" none is.
    """
    if name == "none":
        return []
    installed = [tracker for tracker in TRACKERS if find_spec(tracker) is not None]
    wanted = installed if name == "all" else [name]
    if name != "all" and name not in installed:
        raise CoralError(f"the tracker {name} is not installed; run `pip install {name}`.")
    if not wanted:
        raise CoralError(f"no tracker is installed; run `pip install {TRACKERS[0]}`, or another.")
    return [_make(tracker, output.absolute()) for tracker in wanted]


def _make(name: str, output: Path) -> GeneralTracker:
    match name:
        case "wandb":
            return WandBTracker(PROJECT, name=output.name)
        case "trackio":
            return TrackioTracker(PROJECT, name=output.name)
        case _:
            return TensorBoardTracker(output.name, output.parent / "tensorboard")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, int | float | str]:
    """Nested dictionaries and lists as one dictionary with keys such as loss/top_k or accuracy/1."""
    result: dict[str, int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, list | tuple):
            result |= flat({str(i): x for i, x in enumerate(value, start=1)}, f"{prefix}{key}/")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, int | float | str) else str(value)
    return result
