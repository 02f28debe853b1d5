"""The target's features of prepared data, stored as shards: many runs then train without running the target.

DIR/features.json                        of which data and target, which dtype, rows per shard; with the
                                         prepared data's own info and held-out prompts
DIR/features-00001-of-00042.safetensors  for each of its rows `{row}.input_ids` int32 [L], `.loss_mask` bool
                                         [L], `.document_starts` int32, `.features` [L,h], up to the last
                                         trained token

A shard is written aside and renamed, so whatever is there is whole, and the same command goes on. Several
processes may each write their part of the shards into one directory.
"""

import hashlib
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from coral.data import prepared
from coral.data.features import FeatureSource, Rows, feature_batch, used_length
from coral.data.prepared import PreparedData
from coral.data.progress import bar
from coral.drafter.checkpoint import TargetLike, TargetRecord
from coral.errors import CoralError
from coral.files import atomic_bytes, atomic_text

FORMAT_VERSION = 1
MANIFEST = "features.json"
_AGAIN = "run the same `coral data features` command again, which writes what is missing."
_FIELDS = ("input_ids", "loss_mask", "document_starts", "features")
_HEADER = 400  # bytes at most, of a row in its shard's header
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ShardTarget(TargetLike, FeatureSource, Protocol):
    """What storing features asks of a target."""


@dataclass(frozen=True)
class StoredRows:
    """Rows of prepared data with their features, each read from its shard when it is asked for."""

    directory: Path
    target: TargetRecord
    count: int
    """Rows in all shards together."""
    shard_rows: int
    """Rows in each shard but the last."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        index = range(self.count)[index]  # an IndexError ends an iteration
        path = self.shard(index // self.shard_rows)
        try:
            with safe_open(path, "pt") as shard:
                return {name: shard.get_tensor(f"{index}.{name}") for name in _FIELDS}
        except (OSError, SafetensorError) as error:
            raise CoralError(f"{path} cannot be read ({error}); {_AGAIN}") from error

    @property
    def num_shards(self) -> int:
        return math.ceil(self.count / self.shard_rows)

    def shard(self, number: int) -> Path:
        """The file of the shard of this number, from 0, whether it is there or not."""
        return self.directory / f"features-{number + 1:05}-of-{self.num_shards:05}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or not with all the bytes that their headers count."""
        return [number for number in range(self.num_shards) if not _whole(self.shard(number))]

    def rows_of(self, number: int) -> range:
        """Which rows the shard of this number holds."""
        first = number * self.shard_rows
        return range(first, min(first + self.shard_rows, self.count))


def store(
    target: ShardTarget,
    data: PreparedData,
    output: str | Path,
    *,
    dtype: str = "bfloat16",
    shard_rows: int = 64,
    batch_size: int = 8,
    part: tuple[int, int] = (1, 1),
    console: Console | None = None,
) -> StoredRows:
    """Write the features of all rows of `data` into the directory `output`, going on where a run was stopped.

    Args:
        dtype: what is stored, "bfloat16" or "float32"; features of a bfloat16 target lose nothing in either.
        shard_rows: rows in a file, which stands in memory twice while it is written.
        batch_size: rows that the target reads at once.
        part: (i, n) writes the i-th of n parts of the shards, so that n processes share the work.
        console: where sizes and progress are shown; None is silent.

    Raises:
        CoralError: a value out of range, no data, an output made from other data, by another target or with
            other settings, or a disk that is too small, which is said before anything is computed.
    """
    output, (i, n) = Path(output), part
    if dtype not in DTYPES:
        raise CoralError(f"features cannot be stored as {dtype!r}; use {' or '.join(DTYPES)}.")
    if min(shard_rows, batch_size) < 1 or not 1 <= i <= n:
        raise CoralError(f"shard_rows and batch_size must be at least 1, and part {i}/{n} within 1/{n}.")
    if len(data.dataset) == 0:
        raise CoralError("the prepared data holds no rows; prepare it from other conversations.")
    _refuse_foreign(output)
    fingerprint, sizes = _measure(data.dataset, target.hidden_size * DTYPES[dtype].itemsize, console)
    stored = StoredRows(output, TargetRecord.of(target), len(sizes), shard_rows)
    manifest = {
        "format_version": FORMAT_VERSION,
        "data": fingerprint,
        "rows": len(sizes),
        "shard_rows": shard_rows,
        "dtype": dtype,
        "computed_in": str(target.head_weight.dtype).removeprefix("torch."),
        "target": asdict(stored.target),
        "info": data.info,
        "held_out_prompts": data.held_out_prompts,
    }
    if (output / MANIFEST).exists():
        _refuse_other(output, manifest)
    missing = stored.missing()
    _check_space(output, sum(sizes[row] for k in missing for row in stored.rows_of(k)), console)
    atomic_text(output / MANIFEST, json.dumps(manifest) + "\n")
    mine = [k for k in missing if k % n == i - 1]
    with bar(console, "storing features", sum(len(stored.rows_of(k)) for k in mine)) as advance:
        for k in mine:
            for aside in output.glob(f".{stored.shard(k).name}.*"):  # of a process that was killed
                aside.unlink(missing_ok=True)
            tensors: dict[str, Tensor] = {}
            for start in range(0, len(stored.rows_of(k)), batch_size):
                rows = stored.rows_of(k)[start : start + batch_size]
                tensors |= _tensors(target, data.dataset, rows, DTYPES[dtype])
                advance(len(rows))
            atomic_bytes(stored.shard(k), serialise(tensors))
    return stored


def load(source: str | Path) -> PreparedData:
    """Open what `coral data features` or `coral data prepare` wrote; the rows stay on disk.

    Raises:
        CoralError: it is neither, was written by a newer version, or shards are missing or torn.
    """
    directory = Path(source)
    if not (directory / MANIFEST).is_file():
        return prepared.load(directory)
    manifest = _read_manifest(directory)
    record = TargetRecord(**manifest["target"])
    stored = StoredRows(directory, record, manifest["rows"], manifest["shard_rows"])
    if missing := [stored.shard(k).name for k in stored.missing()]:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise CoralError(
            f"{directory} lacks {len(missing)} of its {stored.num_shards} shards, "
            f"{', '.join(missing[:10])}{more}; {_AGAIN}"
        )
    return PreparedData(stored, manifest["held_out_prompts"], manifest["info"])


def refuse_other_target(dataset: Rows, target: TargetLike) -> None:
    """Raise CoralError when `dataset` holds features that another target computed."""
    if isinstance(dataset, StoredRows):
        _refuse_target(dataset.directory, dataset.target, TargetRecord.of(target))


def _measure(dataset: Rows, bytes_per_feature: int, console: Console | None) -> tuple[str, list[int]]:
    """A fingerprint of the rows' content, and how many bytes each will need on disk."""
    digest, sizes = hashlib.sha256(), []
    with bar(console, "measuring", len(dataset)) as advance:
        for index in range(len(dataset)):
            row = dataset[index]
            for name, dtype in (("input_ids", "i4"), ("loss_mask", "?"), ("document_starts", "i4")):
                values = np.asarray(row[name], dtype)
                digest.update(len(values).to_bytes(8, "little") + values.tobytes())
            length, starts = used_length(row["loss_mask"]), len(row["document_starts"])
            sizes.append(length * (bytes_per_feature + 4 + 1) + 4 * starts + _HEADER)
            advance()
    return digest.hexdigest()[:16], sizes


def _tensors(target: ShardTarget, dataset: Rows, rows: range, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a shard holds of these rows, on the CPU."""
    batch = feature_batch(target, dataset, rows)
    tensors: dict[str, Tensor] = {}
    for i, row in enumerate(rows):
        length = used_length(dataset[row]["loss_mask"])
        tensors |= {
            f"{row}.input_ids": batch.input_ids[i, :length].to("cpu", torch.int32),
            f"{row}.loss_mask": batch.loss_mask[i, :length].cpu(),
            f"{row}.document_starts": torch.as_tensor(dataset[row]["document_starts"], dtype=torch.int32),
            f"{row}.features": batch.features[i, :length].to("cpu", dtype),
        }
    return {name: tensor.clone() for name, tensor in tensors.items()}  # not views of the padded batch


def _whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CoralError(f"{path} cannot be read ({error!r}); store the features again.") from error
    if version != FORMAT_VERSION:
        raise CoralError(
            f"{directory} has format {version}, this version reads {FORMAT_VERSION}; update coral."
        )
    return manifest


def _refuse_foreign(output: Path) -> None:
    """Refuse an output that is no place for shards."""
    if output.exists() and not output.is_dir():
        raise CoralError(
            f"{output} is a file, but a directory is to be written there; choose another output."
        )
    files = output.iterdir() if output.is_dir() else ()
    if not (output / MANIFEST).exists() and any(path.name[0] != "." for path in files):
        raise CoralError(f"{output} holds other files; choose an empty or new directory.")


def _refuse_other(output: Path, manifest: dict[str, Any]) -> None:
    """Refuse an output that was begun as another job than the one of this manifest."""
    before = _read_manifest(output)
    _refuse_target(output, TargetRecord(**before["target"]), TargetRecord(**manifest["target"]))
    if before["data"] != manifest["data"]:
        raise CoralError(
            f"{output} holds features of other data ({before['rows']} rows, here are {manifest['rows']}, or "
            "other tokens); use the same data, or choose another output."
        )
    for key in ("dtype", "computed_in", "shard_rows"):
        if before[key] != manifest[key]:
            raise CoralError(
                f"the features in {output} were begun with {key} {before[key]}, now it is {manifest[key]}; "
                "use the old value, or choose another output."
            )


def _refuse_target(directory: Path, recorded: TargetRecord, given: TargetRecord) -> None:
    if any(getattr(recorded, k) != getattr(given, k) for k in ("vocab_size", "hidden_size", "fingerprint")):
        raise CoralError(
            f"the features in {directory} are those of the target {recorded.name}, but {given.name} has "
            "other weights; use that target, or store the features of this one elsewhere."
        )


def _check_space(output: Path, needed: int, console: Console | None) -> None:
    """Say how much is to be written, and refuse when the disk has less."""
    place = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if console is not None:
        console.print(f"{decimal(needed)} to write, {decimal(free)} free: {output}", highlight=False)
    if needed > free:
        raise CoralError(
            f"the features need {decimal(needed)}, but {place} has {decimal(free)} free; make room, choose "
            "another output, prepare less data (--limit), or train without stored features."
        )
