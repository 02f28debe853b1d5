"""Heads turn draft features into draft tokens. A head can only change speed, never the output.

`topk(features [N, h], k, states, scores [N]) -> (ids [N, k] int64, log_probs [N, k] float32)`, likeliest
first. `scores` are the log-probabilities of the nodes that the features belong to, for a head that spends its
effort on the likely ones; `states` are the sequences that they belong to, in order, each with as many rows,
for a head that learns from the text. Log-probabilities of one head are comparable across nodes.

A drafter's directory holds the heads that were made for it in `coral/heads/`; "full" and "in_context"
are made from the target alone.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from coral.drafters import checkpoint
from coral.drafters.heads.in_context import InContextHead
from coral.drafters.heads.reduced import LowRankHead, StaticHead, Table
from coral.drafters.heads.routed import RoutedHead, Router
from coral.errors import CoralError
from coral.files import atomic_bytes, atomic_text
from coral.target.target import Target

KINDS = ("routed", "static", "low_rank")
HEADS = ("auto", "full", "in_context", *KINDS)
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


class FullHead:
    """The target's own LM head, all rows."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.num_bytes = target.head_weight.numel() * target.head_weight.element_size()

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = self.log_probs(features)
        values, ids = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
        return ids, values

    def table(self, state: Any) -> Table:
        bias = self.target.head_bias
        return Table(self.target.head_weight, None if bias is None else bias.float(), fixed=True)

    def log_probs(self, features: Tensor) -> Tensor:
        """[N, V] float32."""
        return self.target.head(features).float().log_softmax(-1)


def save(directory: Path, kind: str, tensors: Mapping[str, Tensor], **numbers: int) -> None:
    """Write a head into a drafter's directory, in one step, and make it the drafter's own.

    Args:
        tensors: routed: `ids` [G, R] and `router.*`; static: `ids` [K]; low_rank: `up` [V, r], `down` [r, h].
        numbers: routed: `active`, `core` (how many ids are in no group); low_rank: `rescored`.

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
        return _ids(_read(path)[0], 1) if path.exists() else None


def save_token_map(directory: Path, ids: Tensor) -> Path:
    """Write the ids of a static head [K] into a drafter's directory, see `write_token_map`; where it is."""
    path = directory / _FOLDER / _TOKEN_MAP
    write_token_map(path, ids)
    return path


def write_token_map(path: Path, ids: Tensor) -> None:
    """Write ids [K] as SGLang reads them (`--speculative-token-map`): a list whose i-th is the target's id
    of draft id i.

    Raises:
        CoralError: the disk refuses.
    """
    buffer = io.BytesIO()  # torch.save hides the reason of a failed write
    torch.save(ids.tolist(), buffer)
    atomic_bytes(path, buffer.getvalue())


def load(
    source: str | Path,
    target: Target,
    which: str = "auto",
    active: int | None = None,
) -> Head:
    """A head of a drafter: "full", "in_context", one that was made for it, or "auto"; see `resolve`.

    Args:
        active: groups of a routed head whose rows are multiplied; None: what it was saved with.

    Raises:
        CoralError: an unknown head, none in the directory, or one for another vocabulary.
    """
    directory = checkpoint.locate(source)
    which = resolve(directory, which)
    if which not in KINDS:
        return of_target(target, which)
    path = _file(directory, which)
    if not path.exists():
        raise CoralError(
            f"the drafter {source} has no {which} head; make one with `coral train-head {source} "
            f"--kind {which}`."
        )
    with _refuse_corrupt(path):
        tensors, numbers = _read(path)
        return _build(target, which, tensors, active, numbers)


def _file(directory: Path, kind: str) -> Path:
    return directory / _FOLDER / f"{kind}.safetensors"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A head's tensors and numbers; raises ValueError for a tensor that is not finite."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = file.metadata() or {}
    if name := checkpoint.not_finite(tensors):
        raise ValueError(f"{name} is not finite")
    return tensors, numbers


def _ids(tensors: dict[str, Tensor], dimensions: int) -> Tensor:
    """The ids of a head, int64; raises ValueError where they are none."""
    ids = tensors.pop("ids")
    if ids.dim() != dimensions or ids.is_floating_point() or not ids.numel():
        raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)}")
    return ids.long()


def _number(numbers: Mapping[str, str], name: str, least: int, most: int) -> int:
    number = int(numbers[name])
    if not least <= number <= most:
        raise ValueError(f"{name} is {number}, not {least} to {most}")
    return number


@contextmanager
def _refuse_corrupt(path: Path) -> Iterator[None]:
    try:
        yield
    except CoralError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
        raise CoralError(f"{path} cannot be read ({str(error).strip()}); make it again.") from error


def of_target(target: Target, which: str) -> Head:
    """A head that is made from the target alone; raises CoralError for any other than full, in_context."""
    match which:
        case "full":
            return FullHead(target)
        case "in_context":
            return InContextHead(target)
    raise CoralError(
        f"head {which!r} lies in a drafter's directory, but a loaded drafter brings none; name the "
        "directory, or ask for full or in_context."
    )


def _build(
    target: Target, kind: str, tensors: dict[str, Tensor], active: int | None, numbers: Mapping[str, str]
) -> Head:
    """Raises ValueError where the tensors are not for this target."""
    shape = target.vocab_size, target.hidden_size
    if kind == "low_rank":
        up, down = tensors["up"], tensors["down"]
        if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
            raise ValueError(f"its factors are not for a head of {shape[0]} x {shape[1]}")
        return LowRankHead(target, up, down, _number(numbers, "rescored", 0, shape[0]))
    ids = _ids(tensors, 1 if kind == "static" else 2)
    if kind == "static":
        if len(ids.unique()) != len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < shape[0]:
            raise ValueError(f"it does not hold ids of {shape[0]}, each once")
        return StaticHead(target, ids)
    core, held = _number({"core": "0", **numbers}, "core", 0, shape[0]), ids[ids >= 0]
    if len(held.unique()) != len(held) or int(held.max()) >= shape[0] or len(held) + core != shape[0]:
        raise ValueError(f"it does not hold each of the target's {shape[0]} ids once")
    router = Router(target.hidden_size, len(ids) + (core > 0))
    router.load_state_dict({name.removeprefix("router."): tensor for name, tensor in tensors.items()})
    return RoutedHead(target, router, ids, active or _number(numbers, "active", 1, len(ids)))
