"""The target's features of prepared data, stored as shards: many runs then train without running the target.

DIR/features.json                        of which data and target, which dtype, rows per shard; with the
                                         prepared data's own info and held-out prompts
DIR/features-00001-of-00042.safetensors  for each of its rows `{row}.input_ids` int32 [L], `.loss_mask` bool
                                         [L], `.document_starts` int32, `.features` [L,h] and `.layer2` [L,h],
                                         what enters that layer, up to the last trained token; in fp8 beside
                                         each its `.scales` [L]

A shard is written aside and renamed, so whatever is there is whole, and the same command goes on. Several
processes may each write their part of the shards into one directory, or each into its own, on whatever node:
the directory above those is then read as one.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coral import json_file
from coral.data import fp8, prepared
from coral.data.features import Rows
from coral.data.prepared import PreparedData
from coral.errors import CoralError
from coral.json_file import STRICT, Id, Size
from coral.target.record import TargetLike, TargetRecord

FORMAT_VERSION = 1
MANIFEST = "features.json"
_AGAIN = "run the same `coral data features` command again, which writes what is missing."
_FIELDS = ("input_ids", "loss_mask", "document_starts")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": fp8.DTYPE}


@dataclass(frozen=True)
class Form:
    """How features are stored."""

    dtype: str = "bfloat16"
    """Key of `DTYPES`. Features of a bfloat16 target lose nothing in bfloat16 and float32, those of any
    target a few percent in fp8 (see `coral.data.fp8`)."""
    shard_rows: int = 64
    """Rows in each shard but the last; a shard stands in memory twice while it is written."""
    layers: tuple[int, ...] = ()
    """What enters these layers of the target is stored, too."""


@dataclass(frozen=True)
class StoredRows:
    """Rows of prepared data with their features, each read from its shard when it is asked for."""

    directory: Path
    target: TargetRecord
    count: int
    """Rows in all shards together."""
    form: Form
    folders: tuple[Path, ...]
    """Where shards are looked for: the directory, or those in it."""
    inner: tuple[int, ...] = ()
    """Whose states rows are read with."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        index = range(self.count)[index]  # an IndexError ends an iteration
        path = self.shard(index // self.form.shard_rows)
        try:
            with safe_open(path, "pt") as shard:
                row = {name: shard.get_tensor(f"{index}.{name}") for name in _FIELDS}
                names = [f"{index}.{state_name(layer)}" for layer in (-1, *self.inner)]
                states = [shard.get_tensor(name) for name in names]
                if self.form.dtype == "fp8":
                    scales = [shard.get_tensor(f"{name}.scales") for name in names]
                    states = [*map(fp8.restore, states, scales)]
                return row | {"states": torch.stack(states)}
        except (OSError, SafetensorError) as error:
            raise CoralError(f"{path} cannot be read ({error}); {_AGAIN}") from error

    @property
    def num_shards(self) -> int:
        return math.ceil(self.count / self.form.shard_rows)

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
        """The rows that the shard of this number holds."""
        first = number * self.form.shard_rows
        return range(first, min(first + self.form.shard_rows, self.count))


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
    layers: list[Annotated[int, Field(ge=0, le=10**4)]] = field(default_factory=list)


def with_inner(dataset: Rows, layers: tuple[int, ...]) -> Rows:
    """These rows with the states of `layers`, where they hold states.

    Raises:
        CoralError: they hold none of such a layer.
    """
    if not isinstance(dataset, StoredRows):
        return dataset
    if absent := {*layers} - {*dataset.form.layers}:
        raise CoralError(
            f"{dataset.directory} holds no states of layer {', '.join(map(str, sorted(absent)))}; store them "
            f"with `coral data features --layers {','.join(map(str, layers))}`, or train on prepared data."
        )
    return replace(dataset, inner=layers)


def state_name(layer: int) -> str:
    """What a shard calls the states of a layer, see `Target.verify`."""
    return "features" if layer == -1 else f"layer{layer}"


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
        refuse_other(folder, manifest, "move it elsewhere, or name one of the directories in it.")
    record = TargetRecord(**manifest["target"])
    form = Form(manifest["dtype"], manifest["shard_rows"], tuple(manifest.get("layers", ())))
    stored = StoredRows(directory, record, manifest["rows"], form, tuple(folders))
    if missing := stored.missing():
        n = manifest.get("parts", 1)
        parts = ", ".join(f"{part}/{n}" for part in sorted({part_of(k, n) for k in missing}))
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise CoralError(
            f"{directory} lacks {len(missing)} of its {stored.num_shards} shards, "
            f"{', '.join(stored.shard(k).name for k in missing[:10])}{more}"
            f"{f' (of --shard {parts})' if n > 1 else ''}; {_AGAIN}"
        )
    info = {**manifest["info"], "digest": manifest["data"]}
    return PreparedData(stored, manifest["held_out_prompts"], info)


def part_of(number: int, parts: int) -> int:
    """The part, from 1 to `parts`, that writes the shard of this number."""
    return number % parts + 1


def refuse_other_target(dataset: Rows, target: TargetLike) -> None:
    """Raise CoralError when `dataset` holds features that another target computed."""
    if isinstance(dataset, StoredRows):
        _refuse_target(dataset.directory, dataset.target, TargetRecord.of(target))


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


def refuse_other(directory: Path, manifest: dict[str, Any], advice: str) -> None:
    """Refuse a directory whose shards belong to another data set, target or setting than this manifest."""
    before = _read_manifest(directory)
    _refuse_target(directory, TargetRecord(**before["target"]), TargetRecord(**manifest["target"]))
    if before["data"] != manifest["data"]:
        raise CoralError(
            f"{directory} holds features of other data ({before['rows']} rows, here are {manifest['rows']}, "
            f"or other tokens); {advice}"
        )
    for key in ("dtype", "computed_in", "shard_rows", "layers"):
        if (begun := before.get(key, [])) != manifest.get(key, []):
            raise CoralError(
                f"the features in {directory} were begun with {key} {begun}, here it is "
                f"{manifest.get(key, [])}; {advice}"
            )


def _refuse_target(directory: Path, recorded: TargetRecord, given: TargetRecord) -> None:
    sizes = [(record.vocab_size, record.hidden_size) for record in (recorded, given)]
    if sizes[0] != sizes[1] or not recorded.has_weights_of(given):
        raise CoralError(
            f"the features in {directory} are those of the target {recorded.name}, but {given.name} has "
            "other weights; use that target, or store the features of this one elsewhere."
        )
