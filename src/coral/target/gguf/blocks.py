"""The matrices of a GGUF file as the file has them, for native products that read its own blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from coral.errors import CoralError
from coral.native.packing import BLOCKS
from coral.target.gguf.config import read_config
from coral.target.gguf.file import read
from coral.target.gguf.weights import order_of_rows, place


class Blocks:
    """The matrices that a forward multiplies with, by the names of the model's parameters; read when needed.

    Args:
        paths: the files of one model.

    Raises:
        CoralError: a file that cannot be read, or a matrix of a quantisation without a native product.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._file = read(paths)
        self._config = read_config(self._file)
        self._placed = place(self._file, self._config)
        head = "lm_head.weight"
        head = head if head in self._placed else "model.embed_tokens.weight"
        self.names = frozenset(
            name
            for name, tensor in self._placed.items()
            if name == head or (name.startswith("model.layers.") and len(tensor.shape) == 2)
        )
        kinds = {self._placed[name].type for name in self.names}
        if unknown := sorted(kind.name for kind in kinds - BLOCKS.keys()):
            raise CoralError(
                f"{self._file.name} holds matrices in {', '.join(unknown)}, which cannot stay packed; only "
                f"{', '.join(kind.name for kind in BLOCKS)} can. Use dtype auto, or another file."
            )

    def packed(self, names: Sequence[str]) -> tuple[GGMLQuantizationType, list[Tensor]]:
        """Some matrices, each [rows, bytes] uint8, with rows in the model's order.

        Raises:
            CoralError: they are of several quantisations, or one is no matrix of the file.
        """
        if foreign := [name for name in names if name not in self.names]:
            raise CoralError(f"{self._file.name} holds no matrix {foreign[0]}; use dtype auto.")
        kinds = {self._placed[name].type for name in names}
        if len(kinds) > 1:
            found = ", ".join(sorted(kind.name for kind in kinds))
            raise CoralError(
                f"{self._file.name} holds {', '.join(names)} in {found}, but they are multiplied together, "
                "so they cannot stay packed; use dtype auto, or another file."
            )
        return kinds.pop(), [self._rows(name) for name in names]

    def _rows(self, name: str) -> Tensor:
        rows, order = self._placed[name].packed(), order_of_rows(self._file, name, self._config)
        return torch.from_numpy(np.ascontiguousarray(rows if order is None else rows[order]))
