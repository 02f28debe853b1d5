"""The target's features of prepared data, stored as shards: many runs then train without running the target.

DIR/features.json                        of which data and target, which dtype, rows per shard; with the
                                         prepared data's own info and held-out prompts
DIR/features-00001-of-00042.safetensors  for each of its rows `{row}.input_ids` int32 [L], `.loss_mask` bool
                                         [L], `.document_starts` int32, `.features` [L,h], up to the last
                                         trained token; in fp8 `.quantised` [L,h] and `.scales` [L] instead

A shard is written aside and renamed, so whatever is there is whole, and the same command goes on. Several
processes may each write their part of the shards into one directory, or each into its own, on whatever node:
the directory above those is then read as one.
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from rich.console import Console
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from coral import json_file
from coral.data import fp8, prepared
from coral.data.features import FeatureSource, Rows, feature_batch, used_length
from coral.data.prepared import PreparedData
from coral.data.rows_digest import RowsDigest
from coral.errors import CoralError
from coral.files import atomic_bytes, atomic_text
from coral.json_file import STRICT, Id, Size
from coral.locks import locked
from coral.progress import bar
from coral.target.record import TargetLike, TargetRecord

FORMAT_VERSION = 1
MANIFEST = "features.json"
_AGAIN = "run the same `coral data features` command again, which writes what is missing."
_FIELDS = ("input_ids", "loss_mask", "document_starts")
_HEADER = 400  # bytes at most, of a row in its shard's header
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": fp8.DTYPE}


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
    dtype: str
    """Key of `DTYPES`."""
    folders: tuple[Path, ...]
    """Where shards are looked for: the directory, or those in it."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        index = range(self.count)[index]  # an IndexError ends an iteration
        path = self.shard(index // self.shard_rows)
        try:
            with safe_open(path, "pt") as shard:
                row = {name: shard.get_tensor(f"{index}.{name}") for name in _FIELDS}
                if self.dtype != "fp8":
                    return row | {"features": shard.get_tensor(f"{index}.features")}
                quantised, scales = (shard.get_tensor(f"{index}.{name}") for name in ("quantised", "scales"))
                return row | {"features": fp8.restore(quantised, scales)}
        except (OSError, SafetensorError) as error:
            raise CoralError(f"{path} cannot be read ({error}); {_AGAIN}") from error

    @property
    def num_shards(self) -> int:
        return math.ceil(self.count / self.shard_rows)

    def shard(self, number: int) -> Path:
        """The file of the shard of this number, from 0, whether it is there or not."""
        name = self._name(number)
        found = (folder / name for folder in self.folders if (folder / name).exists())
        return next(found, self.folders[0] / name)

    def _name(self, number: int) -> str:
        return f"features-{number + 1:05}-of-{self.num_shards:05}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or not with all the bytes that their headers count."""
        there = {file.name for folder in self.folders for file in folder.glob("features-*.safetensors")}
        return [n for n in range(self.num_shards) if self._name(n) not in there or not _whole(self.shard(n))]

    def rows_of(self, number: int) -> range:
        """Which rows the shard of this number holds."""
        first = number * self.shard_rows
        return range(first, min(first + self.shard_rows, self.count))


@dataclass(frozen=True)
class _Manifest:
    """What the manifest holds."""

    __pydantic_config__ = STRICT
    format_version: int
    data: str
    rows: Annotated[int, Field(ge=1, le=10**8)]
    shard_rows: Size
    dtype: Literal["bfloat16", "float32", "fp8"]
    computed_in: str
    target: TargetRecord
    info: prepared.Info
    held_out_prompts: list[list[Id]]
    parts: Size = 1


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
        dtype: what is stored, "bfloat16", "float32" or "fp8"; features of a bfloat16 target lose nothing in
            the first two, those of any target a few percent in fp8 (see `coral.data.fp8`).
        shard_rows: rows in a file, which stands in memory twice while it is written.
        batch_size: rows that the target reads at once.
        part: (i, n) writes the i-th of n parts of the shards, so that n processes share the work, in one
            output or each in its own.
        console: where sizes and progress are shown; None is silent.

    Raises:
        CoralError: a value out of range, no data, an output made from other data, by another target or with
            other settings, another process that writes the same part, or a disk that is too small, which is
            said before anything is computed.
    """
    output, (i, n) = Path(output), part
    if dtype not in DTYPES:
        raise CoralError(f"features cannot be stored as {dtype!r}; use {', '.join(DTYPES)}.")
    if min(shard_rows, batch_size) < 1 or not 1 <= i <= n:
        raise CoralError(f"shard_rows and batch_size must be at least 1, and part {i}/{n} within 1/{n}.")
    if len(data.dataset) == 0:
        raise CoralError("the prepared data holds no rows; prepare it from other conversations.")
    _refuse_foreign(output)
    with locked(output.with_name(f"{output.name}.{i}-of-{n}")):  # other parts may be written beside this one
        return _store(target, data, output, dtype, shard_rows, batch_size, part, console)


def _store(
    target: ShardTarget,
    data: PreparedData,
    output: Path,
    dtype: str,
    shard_rows: int,
    batch_size: int,
    part: tuple[int, int],
    console: Console | None,
) -> StoredRows:
    i, n = part
    per_token = target.hidden_size * DTYPES[dtype].itemsize + 4 * (dtype == "fp8")
    fingerprint, sizes = _measure(data.dataset, per_token, console)
    stored = StoredRows(output, TargetRecord.of(target), len(sizes), shard_rows, dtype, (output,))
    manifest = {
        "format_version": FORMAT_VERSION,
        "data": fingerprint,
        "rows": len(sizes),
        "shard_rows": shard_rows,
        "parts": n,
        "dtype": dtype,
        "computed_in": str(target.head_weight.dtype).removeprefix("torch."),
        "target": asdict(stored.target),
        "info": data.info,
        "held_out_prompts": data.held_out_prompts,
    }
    if (output / MANIFEST).exists():
        _refuse_other(output, manifest, "use what it was begun with, or choose another output.")
    missing = stored.missing()
    mine = [k for k in missing if _part(k, n) == i]
    needed, all_needed = (
        sum(sizes[row] for k in shards for row in stored.rows_of(k)) for shards in (mine, missing)
    )
    _check_space(output, needed, all_needed, console)
    atomic_text(output / MANIFEST, json.dumps(manifest) + "\n")
    with bar(console, "storing features", sum(len(stored.rows_of(k)) for k in mine)) as advance:
        for k in mine:
            for aside in output.glob(f".{stored.shard(k).name}.*"):  # of a process that was killed
                aside.unlink(missing_ok=True)
            tensors: dict[str, Tensor] = {}
            for start in range(0, len(stored.rows_of(k)), batch_size):
                rows = stored.rows_of(k)[start : start + batch_size]
                tensors |= _tensors(target, data.dataset, rows, dtype)
                advance(len(rows))
            atomic_bytes(stored.shard(k), serialise(tensors))
    return stored


def load(source: str | Path) -> PreparedData:
    """Open what `coral data features` or `coral data prepare` wrote; the rows stay on disk.

    A directory whose sub-directories each hold a part of the shards is read as one.

    Raises:
        CoralError: it is neither, was written by a newer version, shards are missing or torn, or
            sub-directories were not written for one job.
    """
    directory = Path(source)
    whole = (directory / MANIFEST).is_file() or (directory / "coral.json").is_file()
    folders = [directory] if whole else sorted(path.parent for path in directory.glob(f"*/{MANIFEST}"))
    if not folders or not (folders[0] / MANIFEST).is_file():
        return prepared.load(directory)
    manifest = _read_manifest(folders[0])
    for folder in folders[1:]:
        _refuse_other(folder, manifest, "move it elsewhere, or name one of the directories in it.")
    record = TargetRecord(**manifest["target"])
    stored = StoredRows(
        directory, record, manifest["rows"], manifest["shard_rows"], manifest["dtype"], tuple(folders)
    )
    if missing := stored.missing():
        n = manifest.get("parts", 1)
        parts = ", ".join(f"{part}/{n}" for part in sorted({_part(k, n) for k in missing}))
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise CoralError(
            f"{directory} lacks {len(missing)} of its {stored.num_shards} shards, "
            f"{', '.join(stored.shard(k).name for k in missing[:10])}{more}"
            f"{f' (of --shard {parts})' if n > 1 else ''}; {_AGAIN}"
        )
    info = {**manifest["info"], "digest": manifest["data"]}
    return PreparedData(stored, manifest["held_out_prompts"], info)


def _part(number: int, parts: int) -> int:
    """Which of so many parts writes the shard of this number; both as --shard counts."""
    return number % parts + 1


def refuse_other_target(dataset: Rows, target: TargetLike) -> None:
    """Raise CoralError when `dataset` holds features that another target computed."""
    if isinstance(dataset, StoredRows):
        _refuse_target(dataset.directory, dataset.target, TargetRecord.of(target))


def _measure(dataset: Rows, bytes_per_feature: int, console: Console | None) -> tuple[str, list[int]]:
    """A fingerprint of the rows' content, and how many bytes each will need on disk."""
    digest, sizes = RowsDigest(), []
    with bar(console, "measuring", len(dataset)) as advance:
        for index in range(len(dataset)):
            row = dataset[index]
            digest.add(row)
            length, starts = used_length(row["loss_mask"]), len(row["document_starts"])
            sizes.append(length * (bytes_per_feature + 4 + 1) + 4 * starts + _HEADER)
            advance()
    return str(digest), sizes


def _tensors(target: ShardTarget, dataset: Rows, rows: range, dtype: str) -> dict[str, Tensor]:
    """What a shard holds of these rows, on the CPU."""
    batch = feature_batch(target, dataset, rows, joined=target.device.type == "cpu")
    tensors: dict[str, Tensor] = {}
    i = begin = 0
    for row in rows:
        length = used_length(dataset[row]["loss_mask"])
        place = i, slice(begin, begin + length)
        tensors |= {
            f"{row}.input_ids": batch.input_ids[place].to("cpu", torch.int32),
            f"{row}.loss_mask": batch.loss_mask[place].cpu(),
            f"{row}.document_starts": torch.as_tensor(dataset[row]["document_starts"], dtype=torch.int32),
        }
        features = batch.features[place]
        i, begin = (i, begin + length) if len(batch.input_ids) < len(rows) else (i + 1, 0)
        if dtype == "fp8":
            quantised, scales = fp8.quantise(features)
            tensors |= {f"{row}.quantised": quantised.cpu(), f"{row}.scales": scales.cpu()}
        else:
            tensors[f"{row}.features"] = features.to("cpu", DTYPES[dtype])
    return {name: tensor.clone() for name, tensor in tensors.items()}  # not views of the padded batch


def _whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read_manifest(directory: Path) -> dict[str, Any]:
    path, again = directory / MANIFEST, "store the features again."
    manifest: dict[str, Any] = json_file.read(path, dict, again)
    version = manifest.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise CoralError(
            f"{directory} has format {version}, this version reads {FORMAT_VERSION}; update coral."
        )
    json_file.read(path, _Manifest, again)
    prepared.check_prompts(path, manifest["held_out_prompts"], manifest["info"], again)
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


def _refuse_other(directory: Path, manifest: dict[str, Any], advice: str) -> None:
    """Refuse a directory of shards that was begun as another job than the one of this manifest."""
    before = _read_manifest(directory)
    _refuse_target(directory, TargetRecord(**before["target"]), TargetRecord(**manifest["target"]))
    if before["data"] != manifest["data"]:
        raise CoralError(
            f"{directory} holds features of other data ({before['rows']} rows, here are {manifest['rows']}, "
            f"or other tokens); {advice}"
        )
    for key in ("dtype", "computed_in", "shard_rows"):
        if before[key] != manifest[key]:
            raise CoralError(
                f"the features in {directory} were begun with {key} {before[key]}, here it is "
                f"{manifest[key]}; {advice}"
            )


def _refuse_target(directory: Path, recorded: TargetRecord, given: TargetRecord) -> None:
    sizes = [(record.vocab_size, record.hidden_size) for record in (recorded, given)]
    if sizes[0] != sizes[1] or not recorded.has_weights_of(given):
        raise CoralError(
            f"the features in {directory} are those of the target {recorded.name}, but {given.name} has "
            "other weights; use that target, or store the features of this one elsewhere."
        )


def _check_space(output: Path, needed: int, all_needed: int, console: Console | None) -> None:
    """Say how much is to be written here, and by all parts together; refuse when the disk has less than that
    of this part (the others may write on other nodes).
    """
    place = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if console is not None:
        total = f" (all parts: {decimal(all_needed)})" if all_needed > needed else ""
        console.print(f"{decimal(needed)} to write{total}, {decimal(free)} free: {output}", highlight=False)
    if needed > free:
        raise CoralError(
            f"the features need {decimal(needed)}, but {place} has {decimal(free)} free; make room, choose "
            "another output, store them smaller (--store fp8), prepare less data (--limit), or train without "
            "stored features."
        )
