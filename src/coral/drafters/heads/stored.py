"""What the file of a head holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Stored(NamedTuple):
    """Tensors and numbers by name; none where a head is made from the target alone."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, str]

    def ids(self, dimensions: int) -> Tensor:
        """The tensor `ids`, int64; raises ValueError where it holds none."""
        ids = self.tensors["ids"]
        if ids.dim() != dimensions or ids.is_floating_point() or not ids.numel():
            raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)}")
        return ids.long()

    def number(self, name: str, least: int, most: int, default: int | None = None) -> int:
        """A number of this range; raises ValueError outside it, and KeyError where there is none."""
        number = int(self.numbers[name] if default is None else self.numbers.get(name, default))
        if not least <= number <= most:
            raise ValueError(f"{name} is {number}, not {least} to {most}")
        return number
