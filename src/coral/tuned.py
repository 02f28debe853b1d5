"""The draft trees that `coral tune` found for a drafter: `coral/trees.json` in the drafter's directory.

One entry for each place where it was tuned, since the best tree follows from what verification and drafting
cost there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from coral import __version__
from coral.decoding.tree import Budget
from coral.errors import CoralError
from coral.files import atomic_text
from coral.machine import device_name
from coral.target import Target

_FILE = Path("coral") / "trees.json"


@dataclass(frozen=True)
class Place:
    """What the costs of a tree depend on, beside the drafter.

    device: the GPU's name or the CPU's model; threads: those of the CPU, 0 on a GPU. layers: the target's.
    head: the kind of the drafter's LM head.
    """

    device: str
    threads: int
    dtype: str
    compiled: bool
    layers: int
    head: str

    @classmethod
    def of(cls, target: Target, head: str, compiled: bool) -> Place:
        return cls(
            device_name(target.device),
            torch.get_num_threads() if target.device.type == "cpu" else 0,
            str(target.dtype).removeprefix("torch."),
            compiled,
            target.config.num_hidden_layers,
            head,
        )


def find(directory: Path, place: Place) -> Budget | None:
    """The tree that was tuned for this drafter at this place, if any.

    Raises:
        CoralError: the file is there but cannot be read.
    """
    path = directory / _FILE
    with _refuse_corrupt(path):
        return next((Budget(**e["budget"]) for e in _entries(path) if Place(**e["place"]) == place), None)


def save(directory: Path, place: Place, budget: Budget, predicted: float, achieved: float) -> Path:
    """Write down the tree of a place, with the speedups over plain decoding that go with it.

    Returns:
        The written file.

    Raises:
        CoralError: the file that is there cannot be read, or the disk refuses.
    """
    path = directory / _FILE
    entry = {
        "place": asdict(place),
        "budget": asdict(budget),
        "predicted_speedup": round(predicted, 3),
        "achieved_speedup": round(achieved, 3),
        "date": date.today().isoformat(),
        "version": __version__,
    }
    with _refuse_corrupt(path):
        others = [e for e in _entries(path) if Place(**e["place"]) != place]
    _write(path, [*others, entry])
    return path


def forget(directory: Path, head: str) -> None:
    """Drop the trees of a head that was made anew: they were tuned to what the old one accepts."""
    path = directory / _FILE
    with _refuse_corrupt(path):
        entries = _entries(path)
        others = [e for e in entries if Place(**e["place"]).head != head]
    if len(others) < len(entries):
        _write(path, others)


def _entries(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["trees"]) if path.exists() else []


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    atomic_text(path, json.dumps({"trees": entries}, indent=1) + "\n")


@contextmanager
def _refuse_corrupt(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CoralError(
            f"{path} cannot be read ({error!r}); delete it, and run `coral tune` again for this drafter."
        ) from error
