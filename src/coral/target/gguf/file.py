"""What lies in a GGUF file: metadata by key, and tensors that are read a few rows at a time.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. gguf-py reads it, too, but makes an
array of every token, which takes seconds and hundreds of megabytes; its dequantisation is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from coral.errors import CoralError
from coral.files import POINTER, is_pointer

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: `shape` as torch has it, `offset` in bytes from the file's beginning."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size

    def packed(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes [rows, row_bytes] uint8 of some rows; a row is a whole number of blocks."""
        count = (self.rows if stop is None else stop) - start
        offset = self.offset + start * self.row_bytes
        flat = np.fromfile(self.path, np.uint8, count * self.row_bytes, offset=offset)
        return flat.reshape(count, self.row_bytes)


@dataclass(frozen=True)
class File:
    """A model in one file or several. `metadata` is the first one's; an array of numbers is a numpy array."""

    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.paths[0].name

    @cached_property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def keys(self) -> dict[str, Any]:
        """The metadata under the architecture's name, without that prefix."""
        prefix = f"{self.architecture}."
        return {k.removeprefix(prefix): v for k, v in self.metadata.items() if k.startswith(prefix)}


def read(paths: Sequence[Path]) -> File:
    """Read the metadata and the list of tensors of a model in these files, in order.

    Raises:
        CoralError: one is no GGUF file, of another version, damaged, or does not belong to the others.
    """
    metadata: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for number, path in enumerate(paths):
        own, found = _read_one(path)
        metadata = metadata or own
        count, part = int(own.get("split.count", 1)), int(own.get("split.no", 0))
        if count > 1 and (count, part) != (len(paths), number):
            raise CoralError(
                f"{path} says that it is part {part + 1} of {count}, but it is used as part {number + 1} of "
                f"{len(paths)}; keep the names that the parts were published under, side by side."
            )
        if twice := sorted(tensors.keys() & found.keys()):
            raise CoralError(f"{path} holds {twice[0]}, which another part holds, too; download it again.")
        tensors |= found
    expected = int(metadata.get("split.tensors.count", len(tensors)))
    if expected != len(tensors):
        raise CoralError(
            f"{paths[0]} and its parts hold {len(tensors)} tensors of {expected}; a part is missing."
        )
    return File(tuple(paths), metadata, tensors)


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.take("Q")
        self.at += length
        if self.at > len(self.data):
            raise ValueError("a string reaches past the end")
        return self.data[self.at - length : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        kind, count = self.take("I"), self.take("Q")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        numbers = np.frombuffer(self.data, np.dtype(_SCALARS[kind]).newbyteorder("<"), count, self.at).copy()
        self.at += numbers.nbytes
        return numbers


def _read_one(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    again = "download it again."
    if path.stat().st_size < 24:
        raise CoralError(f"{path} is no GGUF file: it has {path.stat().st_size} bytes; {again}")
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            if is_pointer(path):
                raise CoralError(f"{path} {POINTER}.")
            raise CoralError(f"{path} is no GGUF file: it does not begin with GGUF; check the path.")
        cursor = _Cursor(data)
        cursor.at = 4
        version = cursor.take("I")
        if version not in (2, 3):
            raise CoralError(
                f"{path} is a GGUF file of version {version}; only 2 and 3, little-endian, are read."
            )
        try:
            num_tensors, num_keys = cursor.take("Q"), cursor.take("Q")
            metadata = {cursor.string(): cursor.value(cursor.take("I")) for _ in range(num_keys)}
            infos = {}
            for _ in range(num_tensors):
                name = cursor.string()
                shape = tuple(reversed([cursor.take("Q") for _ in range(cursor.take("I"))]))
                infos[name] = (shape, cursor.take("I"), cursor.take("Q"))
        except (ValueError, KeyError, struct.error) as error:
            raise CoralError(f"{path} is a damaged GGUF file ({error}); {again}") from error
        alignment = int(metadata.get("general.alignment", 32))
        begin = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in infos.items():
        if kind not in iter(GGMLQuantizationType):
            raise CoralError(
                f"{path}: {name} is stored as type {kind}, which the installed gguf does not know; "
                "`pip install --upgrade gguf`, or use another quantisation."
            )
        tensor = Tensor(path, begin + offset, shape, GGMLQuantizationType(kind))
        if missing := max(0, tensor.offset + tensor.rows * tensor.row_bytes - path.stat().st_size):
            raise CoralError(f"{path} is cut short: {name} lacks {missing:,} bytes; {again}")
        tensors[name] = tensor
    return metadata, tensors
