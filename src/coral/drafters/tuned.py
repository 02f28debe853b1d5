"""The draft trees that `coral tune` found for a drafter: `coral/trees.json` in the drafter's directory.

There is one entry for each set of conditions, since the best tree follows from what verification and drafting
cost under them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from coral import __version__, json_file
from coral.device import device_name
from coral.files import atomic_text
from coral.json_file import STRICT, Seconds
from coral.target.target import Target
from coral.tree import TreeSize

_FILE = Path("coral") / "trees.json"


@dataclass(frozen=True)
class Conditions:
    """What the best tree depends on, beside the drafter.

    device: the GPU's name or the CPU's model; threads: those of the CPU, 0 on a GPU.
    backend, layers: the target's. head: the kind of the drafter's LM head.
    """

    device: str
    threads: int
    dtype: str
    backend: str
    layers: int
    head: str

    @classmethod
    def of(cls, target: Target, head: str) -> Conditions:
        return cls(
            device_name(target.device),
            torch.get_num_threads() if target.device.type == "cpu" else 0,
            target.precision,
            target.backend,
            target.facts.num_layers,
            head,
        )


@dataclass(frozen=True)
class _Entry:
    conditions: Conditions
    tree_size: TreeSize
    predicted_speedup: Seconds
    achieved_speedup: Seconds
    date: str
    version: str


@dataclass(frozen=True)
class _Trees:
    """What the file holds."""

    __pydantic_config__ = STRICT
    trees: list[_Entry]


def find(directory: Path, conditions: Conditions) -> TreeSize | None:
    """The tree that was tuned for this drafter under these conditions, if any.

    Raises:
        CoralError: the file is there but cannot be read.
    """
    path = directory / _FILE
    return next((entry.tree_size for entry in _entries(path) if entry.conditions == conditions), None)


def save(
    directory: Path, conditions: Conditions, tree_size: TreeSize, predicted: float, achieved: float
) -> Path:
    """Write down the tree of some conditions, with the speedups over plain decoding that go with it.

    Returns:
        The written file.

    Raises:
        CoralError: the file that is there cannot be read, or the disk refuses.
    """
    path = directory / _FILE
    rounded = round(predicted, 3), round(achieved, 3)
    entry = _Entry(conditions, tree_size, *rounded, date.today().isoformat(), __version__)
    _write(path, [*(each for each in _entries(path) if each.conditions != conditions), entry])
    return path


def forget(directory: Path, head: str) -> None:
    """Drop the trees of a head that was made anew: they were tuned to the acceptance of the old one."""
    path = directory / _FILE
    entries = _entries(path)
    others = [each for each in entries if each.conditions.head != head]
    if len(others) < len(entries):
        _write(path, others)


def _entries(path: Path) -> list[_Entry]:
    if not path.exists():
        return []
    return json_file.read(path, _Trees, "delete it, and run `coral tune` again for this drafter.").trees


def _write(path: Path, entries: list[_Entry]) -> None:
    atomic_text(path, json.dumps(asdict(_Trees(entries)), indent=1) + "\n")
