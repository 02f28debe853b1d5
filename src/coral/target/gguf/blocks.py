"""The matrices of a GGUF file as the file has them, for native products that read its own blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from coral.errors import CoralError
from coral.native.packing import BLOCKS


class Place(TypedDict):
    """Where a matrix lies: a file, the offset of its first byte, its shape as torch has it.

    kind: of its blocks. heads: see `weights.interleaved_heads`.
    """

    path: str
    offset: int
    shape: list[int]
    kind: str
    heads: int


class Blocks:
    """The matrices that a forward multiplies with, by the names of the model's parameters; read when needed.

    Args:
        places: where each lies.

    Raises:
        CoralError: a matrix of a quantisation without a native product.
    """

    def __init__(self, places: dict[str, Place]) -> None:
        self.places = places
        kinds = {place["kind"] for place in places.values()}
        if unknown := sorted(kinds - BLOCKS.keys()):
            raise CoralError(
                f"{self.name} holds matrices in {', '.join(unknown)}, which cannot stay packed; only "
                f"{', '.join(BLOCKS)} can. Use dtype auto, or another file."
            )

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Blocks:
        """Of the files of one model. Raises CoralError where they cannot be read."""
        from coral.target.gguf.config import read_config
        from coral.target.gguf.file import read
        from coral.target.gguf.weights import interleaved_heads, place

        file = read(paths)
        config = read_config(file)
        placed = place(file, config)
        head = "lm_head.weight" if "lm_head.weight" in placed else "model.embed_tokens.weight"
        return cls(
            {
                name: {
                    "path": str(tensor.path.resolve()),
                    "offset": tensor.offset,
                    "shape": [*tensor.shape],
                    "kind": tensor.type.name,
                    "heads": interleaved_heads(file, name, config),
                }
                for name, tensor in placed.items()
                if name == head or (name.startswith("model.layers.") and len(tensor.shape) == 2)
            }
        )

    @property
    def name(self) -> str:
        return Path(next(iter(self.places.values()))["path"]).name

    def columns(self, name: str) -> int:
        """How many numbers a row of a matrix has."""
        return self.places[name]["shape"][1]

    def packed(self, names: Sequence[str]) -> tuple[str, list[Tensor]]:
        """Some matrices, each [rows, bytes] uint8, with rows in the model's order.

        Raises:
            CoralError: they are of several quantisations, or one is no matrix of the file.
        """
        if foreign := [name for name in names if name not in self.places]:
            raise CoralError(f"{self.name} holds no matrix {foreign[0]}; use dtype auto.")
        kinds = {self.places[name]["kind"] for name in names}
        if len(kinds) > 1:
            found = ", ".join(sorted(kinds))
            raise CoralError(
                f"{self.name} holds {', '.join(names)} in {found}, but they are multiplied together, "
                "so they cannot stay packed; use dtype auto, or another file."
            )
        return kinds.pop(), [_rows(self.places[name]) for name in names]


def _rows(place: Place) -> Tensor:
    rows, columns = place["shape"]
    size = columns // 32 * BLOCKS[place["kind"]][1]
    flat = np.fromfile(place["path"], np.uint8, rows * size, offset=place["offset"])
    found = flat.reshape(rows, size)
    return torch.from_numpy(in_order(found, place["heads"]) if place["heads"] else found)


def in_order(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows [n, ...] of heads with the two of a rotated pair side by side -> half a head apart."""
    order = np.arange(len(rows)).reshape(heads, len(rows) // heads // 2, 2).swapaxes(1, 2).ravel()
    return np.ascontiguousarray(rows[order])
