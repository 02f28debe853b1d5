"""Write a drafter as another engine loads it, or refuse it: engines rarely say what they miss or drop."""

from __future__ import annotations

import io
from collections.abc import Set
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from coral import __version__
from coral.drafters import checkpoint
from coral.drafters.heads import store as heads
from coral.drafters.heads.static import write_token_map
from coral.errors import CoralError
from coral.export import eagle, fused_eagle, fused_sglang, fused_vllm, sglang, vllm, vllm_coral
from coral.files import atomic_directory
from coral.target.record import TargetRecord
from coral.target.target import Target

_RECORD = Path("coral") / "export.json"  # engines do not look into folders
_TOKEN_MAP = "token_map.pt"
_OURS = ("config.json", "*.safetensors", "pytorch_model.bin", _TOKEN_MAP, "coral/*")  # of any format


class Format(Protocol):
    """What a module of a format says of it."""

    FILE: str
    """The file of tensors."""
    KEYS: frozenset[str]
    """The keys of config.json, all and no other."""
    READS_TARGET: bool
    """Whether `tensors` needs the target."""
    READS_TOKEN_MAP: bool
    """Whether the engine drafts with the ids of a static head."""
    READS_HEAD: bool
    """Whether the engine drafts with a head as we store it."""

    def names(self, config: Any) -> set[str]:
        """The tensors that such a drafter has in this format, all and no other."""
        ...

    def lacks(self, config: Any) -> list[str]:
        """What the format cannot carry of such a drafter, in words."""
        ...

    def tensors(self, drafter: Any, target: Target | None) -> dict[str, Tensor]: ...
    def config_json(self, config: Any, dtype: torch.dtype) -> dict[str, Any]: ...
    def command(self, target: str, directory: Path, token_map: Path | None) -> str:
        """The command that serves the drafter."""
        ...


FORMATS: dict[str, dict[str, Format]] = {
    "vllm": {"feature": vllm, "eagle3": fused_vllm},
    "vllm-coral": {"feature": vllm_coral},
    "sglang": {"feature": sglang, "eagle3": fused_sglang},
    "eagle": {"feature": eagle, "eagle3": fused_eagle},
}
"""By the name of the engine, and by the kind of the drafters."""


class Exported(NamedTuple):
    """head: the one that goes along; left_out: those that do not; token_map: where the static head went."""

    head: str | None
    left_out: list[str]
    token_map: Path | None
    command: str


def find(name: str) -> dict[str, Format]:
    """A format's modules by kind; raises CoralError when there is no such format."""
    if name not in FORMATS:
        raise CoralError(f"format {name!r} is not known; use {', '.join(FORMATS)} or llama.cpp.")
    return FORMATS[name]


def format_of(to: str, directory: Path) -> Format:
    """The module that writes the drafter in `directory`. Raises CoralError when there is none."""
    modules, kind = find(to), checkpoint.read_config(directory)["kind"]
    if kind not in modules:
        others = [name for name, each in FORMATS.items() if kind in each]
        instead = f"use {' or '.join(others)}" if others else "use a drafter of another kind"
        raise CoralError(f"{to} cannot carry drafters of kind {kind!r}; {instead}.")
    return modules[kind]


def lacks(to: str, ours: dict[str, Any]) -> list[str]:
    """What the format `to` cannot carry of the drafter with this record (see `checkpoint.read_config`), in
    words.
    """
    modules, kind = find(to), ours["kind"]
    if kind not in modules:
        return [f"drafters of kind {kind!r}"]
    return modules[kind].lacks(checkpoint.config_of(ours))


def export(
    directory: Path,
    to: str,
    output: Path,
    *,
    served: str,
    target: Target | None = None,
    dtype: torch.dtype | None = None,
    head: str = "auto",
) -> Exported:
    """Write the drafter in `directory` in the format `to`, in one step.

    Args:
        output: new, empty, or an older export, which is replaced.
        served: the target's directory or hub id, for the command.
        target: given if the format `READS_TARGET`.
        dtype: of the tensors; None: as stored.
        head: which goes along if the format `READS_HEAD`, see `heads.resolve`.

    Raises:
        CoralError: not a drafter of ours, or one of another target; a feature that the format cannot carry,
            which is named; a head that was not made; an output that holds other files; a disk that refuses.
    """
    format, ours = format_of(to, directory), checkpoint.read_config(directory)
    output = output.absolute()
    _refuse_foreign(output)
    if missing := lacks(to, ours):
        raise CoralError(
            f"{to} cannot carry {' and '.join(missing)}, and this drafter needs it; use another format, or "
            "train a drafter without."
        )
    kind = heads.resolve(directory, head) if format.READS_HEAD else None
    if kind is not None and kind not in heads.made(directory):
        raise CoralError(
            f"{to} needs a head, but {directory} has no {kind} one that was made for it; make one with "
            "`coral train-head`, name another, or export to vllm, which drafts with the full head."
        )
    drafter = checkpoint.load(directory, target, dtype=dtype)
    record, config = TargetRecord(**ours["target"]), drafter.config
    tensors = {name: t.detach().cpu().contiguous() for name, t in format.tensors(drafter, target).items()}
    content = format.config_json(config, next(iter(drafter.parameters())).dtype)
    _check(to, "tensors", format.names(config), tensors.keys())
    _check(to, "keys", format.KEYS, content.keys())
    ids = heads.static_ids(directory) if format.READS_TOKEN_MAP else None
    with atomic_directory(output, _OURS) as aside:
        _write_tensors(aside / format.FILE, tensors)
        checkpoint.write_json(aside / "config.json", content)
        if ids is not None:
            write_token_map(aside / _TOKEN_MAP, ids)
        (aside / _RECORD).parent.mkdir()
        if kind is not None:
            heads.copy(directory, aside, kind)
        checkpoint.write_json(
            aside / _RECORD, {"format": to, "version": __version__, "target": asdict(record)}
        )
    token_map = None if ids is None else output / _TOKEN_MAP
    kept = {kind, None if ids is None else "static"}
    left_out = [made for made in heads.made(directory) if made not in kept]
    return Exported(kind, left_out, token_map, format.command(served, output, token_map))


def _check(to: str, what: str, expected: Set[str], found: Set[str]) -> None:
    if odd := sorted(expected ^ found):
        raise CoralError(
            f"{to} and this drafter differ in the {what} {', '.join(odd)}; use another format for it."
        )


def _refuse_foreign(directory: Path) -> None:
    if directory.is_dir() and any(directory.iterdir()) and not (directory / _RECORD).exists():
        raise CoralError(f"{directory} holds files that are not an export; choose an empty or new directory.")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        path.write_bytes(serialise(tensors, metadata={"format": "pt"}))
    else:
        buffer = io.BytesIO()  # torch.save hides the reason of a failed write
        torch.save(tensors, buffer)
        path.write_bytes(buffer.getvalue())
