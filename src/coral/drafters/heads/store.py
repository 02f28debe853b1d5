"""Heads turn draft features into draft tokens. A head can only change speed, never the output.

`topk(features [N, h], k, states, scores [N]) -> (ids [N, k] int64, log_probs [N, k] float32)`, likeliest
first. `scores` are the log-probabilities of the nodes that the features belong to, for a head that spends its
effort on the likely ones; `states` are the sequences that they belong to, in order, each with as many rows,
for a head that learns from the text. Log-probabilities of one head are comparable across nodes.

A drafter's directory holds the heads that were made for it in `coral/heads/`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from coral.drafters import checkpoint
from coral.drafters.heads.rows import Table
from coral.drafters.heads.static import write_token_map
from coral.drafters.heads.stored import Stored
from coral.errors import CoralError
from coral.files import atomic_bytes, atomic_text
from coral.target.target import Target

OF_TARGET = ("full", "in_context")
"""Heads that are made from the target alone. Each kind of head is a module of this room, see `Kind`."""
KINDS = ("routed", "static", "low_rank")
"""Heads that are made for a drafter and lie in its directory."""
HEADS = ("auto", *OF_TARGET, *KINDS)
DEFAULT_HEAD = "in_context"
"""The head of a drafter for which none was made: it needs no training, is no slower than the others and its
tokens are accepted as often (benchmarks/README.md)."""
_FOLDER = Path("coral") / "heads"
_TOKEN_MAP = "token_map.pt"
_OWN = "own"  # a file that names the head that is used if none is asked for


class Head(Protocol):
    """Turns draft features into draft tokens; see the head of this file."""

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one level of a tree reads."""
        ...

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        """The k likeliest ids of each row and their log-probabilities."""
        ...

    def table(self, state: Any) -> Table | None:
        """What `topk` multiplies with for this sequence, if it does no more than that and a softmax."""
        ...


class Kind(Protocol):
    """What a module of a kind of head says of it, beside the class itself."""

    def build(self, target: Target, stored: Stored) -> Head:
        """The head for a target; raises ValueError, or KeyError for what is not stored, where it is for
        another.
        """
        ...


def find(kind: str) -> Kind:
    """The module of a kind of head."""
    return cast(Kind, import_module(f"coral.drafters.heads.{kind}"))


def save(directory: Path, kind: str, tensors: Mapping[str, Tensor], **numbers: int) -> None:
    """Write a head into a drafter's directory, in one step, and make it the drafter's own.

    Args:
        tensors, numbers: what the kind's `build` reads.

    Raises:
        CoralError: the disk refuses.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path = _file(directory, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_bytes(path, serialise(stored, {name: str(number) for name, number in numbers.items()}))
    atomic_text(directory / _FOLDER / _OWN, kind + "\n")


def resolve(directory: Path, which: str) -> str:
    """The kind of head that `which` names in a drafter's directory; "auto" is the one made last, else
    `DEFAULT_HEAD`.

    Raises:
        CoralError: an unknown head, or a file that names none.
    """
    if which not in HEADS:
        raise CoralError(f"head {which!r} is not known; use {', '.join(HEADS)}.")
    own = directory / _FOLDER / _OWN
    if which != "auto":
        return which
    if not own.exists():
        return DEFAULT_HEAD
    try:
        named = own.read_bytes().decode("ascii", "replace").strip()
    except OSError as error:
        raise CoralError(f"{own} cannot be read ({error.strerror}); name a head with --head.") from error
    if named not in KINDS:
        raise CoralError(f"{own} names no head; delete it, or name a head with --head.")
    return named


def made(directory: Path) -> list[str]:
    """The kinds of the heads that were made for a drafter."""
    return [kind for kind in KINDS if _file(directory, kind).exists()]


def copy(source: Path, directory: Path, kind: str) -> None:
    """Put a head of the drafter `source` into another directory, as its own and only one."""
    path = _file(directory, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_file(source, kind), path)
    atomic_text(directory / _FOLDER / _OWN, kind + "\n")


def static_ids(directory: Path) -> Tensor | None:
    """The ids of a drafter's static head, int64 [K]; None where it has none.

    Raises:
        CoralError: it cannot be read.
    """
    path = _file(directory, "static")
    with _refuse_corrupt(path):
        return _read(path).ids(1) if path.exists() else None


def save_token_map(directory: Path, ids: Tensor) -> Path:
    """Write the ids of a static head [K] into a drafter's directory, see `write_token_map`; where it is."""
    path = directory / _FOLDER / _TOKEN_MAP
    write_token_map(path, ids)
    return path


def load(source: str | Path, target: Target, which: str = "auto", **numbers: int) -> Head:
    """A head of a drafter: "full", "in_context", one that was made for it, or "auto"; see `resolve`.

    Args:
        numbers: instead of those that it was saved with: `active=2`, for example.

    Raises:
        CoralError: an unknown head, none in the directory, or one for another vocabulary.
    """
    directory = checkpoint.locate(source)
    which = resolve(directory, which)
    if which in OF_TARGET:
        return of_target(target, which)
    path = _file(directory, which)
    if not path.exists():
        raise CoralError(
            f"the drafter {source} has no {which} head; make one with `coral train-head {source} "
            f"--kind {which}`."
        )
    with _refuse_corrupt(path):
        stored = _read(path)
        given = {name: str(number) for name, number in numbers.items()}
        return find(which).build(target, Stored(stored.tensors, {**stored.numbers, **given}))


def of_target(target: Target, which: str) -> Head:
    """A head that is made from the target alone; raises CoralError for one that is not."""
    if which not in OF_TARGET:
        raise CoralError(
            f"head {which!r} lies in a drafter's directory, but a loaded drafter brings none; name the "
            f"directory, or ask for {' or '.join(OF_TARGET)}."
        )
    return find(which).build(target, Stored({}, {}))


def _file(directory: Path, kind: str) -> Path:
    return directory / _FOLDER / f"{kind}.safetensors"


def _read(path: Path) -> Stored:
    """What a head's file holds; raises ValueError for a tensor that is not finite."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = file.metadata() or {}
    if name := checkpoint.not_finite(tensors):
        raise ValueError(f"{name} is not finite")
    return Stored(tensors, numbers)


@contextmanager
def _refuse_corrupt(path: Path) -> Iterator[None]:
    try:
        yield
    except CoralError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
        raise CoralError(f"{path} cannot be read ({str(error).strip()}); make it again.") from error
