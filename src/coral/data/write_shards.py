"""Compute the features of prepared data and store them as shards, which `shards` reads."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.filesize import decimal
from safetensors.torch import save as serialise
from torch import Tensor

from coral.data import fp8
from coral.data.features import FeatureSource, Rows, feature_batch, used_length
from coral.data.prepared import PreparedData
from coral.data.rows_digest import RowsDigest
from coral.data.shards import (
    DTYPES,
    FORMAT_VERSION,
    MANIFEST,
    Form,
    StoredRows,
    part_of,
    refuse_other,
    state_name,
)
from coral.errors import CoralError
from coral.files import atomic_bytes, atomic_text
from coral.locks import locked
from coral.progress import bar
from coral.target.record import TargetLike, TargetRecord

_HEADER = 400  # bytes at most, of a row in its shard's header


class ShardTarget(TargetLike, FeatureSource, Protocol):
    """What storing features asks of a target."""


def store(
    target: ShardTarget,
    data: PreparedData,
    output: str | Path,
    form: Form | None = None,
    *,
    batch_size: int = 8,
    part: tuple[int, int] = (1, 1),
    console: Console | None = None,
) -> StoredRows:
    """Write the features of all rows of `data` into the directory `output`, going on where a run was stopped.

    Args:
        batch_size: rows that the target reads at once.
        part: (i, n) writes the i-th of n parts of the shards, so that n processes share the work, in one
            output or each in its own.
        console: where sizes and progress are shown; None is silent.

    Raises:
        CoralError: a value out of range, no data, an output made from other data, by another target or with
            other settings, another process that writes the same part, or a disk that is too small, which is
            said before anything is computed.
    """
    output, (i, n), form = Path(output), part, form or Form()
    if form.dtype not in DTYPES:
        raise CoralError(f"features cannot be stored as {form.dtype!r}; use {', '.join(DTYPES)}.")
    if min(form.shard_rows, batch_size) < 1 or not 1 <= i <= n:
        raise CoralError(f"shard_rows and batch_size must be at least 1, and part {i}/{n} within 1/{n}.")
    if len(data.dataset) == 0:
        raise CoralError("the prepared data holds no rows; prepare it from other conversations.")
    _refuse_foreign(output)
    with locked(output.with_name(f"{output.name}.{i}-of-{n}")):  # other parts may be written beside this one
        stored = StoredRows(output, TargetRecord.of(target), len(data.dataset), form, (output,))
        return _store(target, data, stored, batch_size, part, console)


def _store(
    target: ShardTarget,
    data: PreparedData,
    stored: StoredRows,
    batch_size: int,
    part: tuple[int, int],
    console: Console | None,
) -> StoredRows:
    (i, n), output, form = part, stored.directory, stored.form
    per_state = target.hidden_size * DTYPES[form.dtype].itemsize + 4 * (form.dtype == "fp8")
    fingerprint, sizes = _measure(data.dataset, per_state * (1 + len(form.layers)), console)
    manifest = {
        "format_version": FORMAT_VERSION,
        "data": fingerprint,
        "rows": len(sizes),
        "parts": n,
        **asdict(form),
        "layers": [*form.layers],
        "computed_in": str(target.head_weight.dtype).removeprefix("torch."),
        "target": asdict(stored.target),
        "info": data.info,
        "held_out_prompts": data.held_out_prompts,
    }
    if (output / MANIFEST).exists():
        refuse_other(output, manifest, "use what it was begun with, or choose another output.")
    missing = stored.missing()
    mine = [k for k in missing if part_of(k, n) == i]
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
                tensors |= _tensors(target, data.dataset, rows, form)
                advance(len(rows))
            atomic_bytes(stored.shard(k), serialise(tensors))
    return stored


def _measure(dataset: Rows, bytes_per_token: int, console: Console | None) -> tuple[str, list[int]]:
    """A fingerprint of the rows' content, and how many bytes each will need on disk."""
    digest, sizes = RowsDigest(), []
    with bar(console, "measuring", len(dataset)) as advance:
        for index in range(len(dataset)):
            row = dataset[index]
            digest.add(row)
            length, starts = used_length(row["loss_mask"]), len(row["document_starts"])
            sizes.append(length * (bytes_per_token + 4 + 1) + 4 * starts + _HEADER)
            advance()
    return str(digest), sizes


def _tensors(target: ShardTarget, dataset: Rows, rows: range, form: Form) -> dict[str, Tensor]:
    """The tensors of these rows as a shard holds them, on the CPU."""
    batch = feature_batch(target, dataset, rows, form.layers, joined=target.device.type == "cpu")
    states = batch.features if batch.inner is None else torch.cat([batch.features, batch.inner], -1)
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
        parts = states[place].split(target.hidden_size, -1)
        for layer, state in zip((-1, *form.layers), parts, strict=True):
            name = f"{row}.{state_name(layer)}"
            if form.dtype == "fp8":
                quantised, scales = fp8.quantise(state)
                tensors |= {name: quantised.cpu(), f"{name}.scales": scales.cpu()}
            else:
                tensors[name] = state.to("cpu", DTYPES[form.dtype])
        i, begin = (i, begin + length) if len(batch.input_ids) < len(rows) else (i + 1, 0)
    return {name: tensor.clone() for name, tensor in tensors.items()}  # not views of the padded batch


def _refuse_foreign(output: Path) -> None:
    """Refuse an output that is a file, or a directory of other files."""
    if output.exists() and not output.is_dir():
        raise CoralError(
            f"{output} is a file, but a directory is to be written there; choose another output."
        )
    files = output.iterdir() if output.is_dir() else ()
    if not (output / MANIFEST).exists() and any(path.name[0] != "." for path in files):
        raise CoralError(f"{output} holds other files; choose an empty or new directory.")


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
