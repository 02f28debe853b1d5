"""Linear layers whose weights stay packed on the CPU, so that a few rows cost what one row costs.

A float32 product of a few rows with a weight matrix rearranges the whole matrix each time before it
multiplies. MKL can keep it rearranged. 96 products with matrices of 3712 x 256 (365 MB, four cores),
milliseconds by number of rows 1 / 8 / 12 / 16 / 32: as they are 14 / 25 / 23 / 47 / 57, packed 13 / 13 / 15 /
16 / 21.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MOST_ROWS = 64  # above this, rearranging costs little beside the product itself


class PackedLinear(nn.Linear):
    """`nn.Linear` that, without gradients, multiplies few rows by its packed weight.

    The weight is packed when first asked for, and again when it has changed.
    """

    _packed: tuple[Any, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # frozen weights are packed by the compiler
            return super().forward(input)
        rows = input.numel() // self.in_features
        if not 0 < rows <= MOST_ROWS or input.dtype != torch.float32 or torch.is_grad_enabled():
            return super().forward(input)
        weight = self.weight
        made_from = (weight.data_ptr(), weight.shape, 0 if weight.is_inference() else weight._version)
        if self._packed is None or self._packed[0] != made_from:
            self._packed = made_from, _pack(weight)
        return torch.ops.mkl._mkl_linear(input, self._packed[1], weight, self.bias, rows)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles pack anew: a packed tensor has no storage
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class PackedGroups:
    """Products of rows with a few chosen groups of a frozen weight; the groups stay packed where that pays.

    Args:
        weight: [G, R, h]. bias: [G, R] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.detach()
        self.weights = list(weight)
        self.biases = [None] * len(weight) if bias is None else list(bias)
        self.packed = [_pack(group) for group in self.weights] if _can_pack([weight]) else None

    def __call__(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """rows [N, h] with each of the chosen groups, [A] int64: [N, A * R], one group after the other."""
        groups: list[int] = chosen.tolist()
        if self.packed is None or not 0 < len(rows) <= MOST_ROWS or torch.is_grad_enabled():
            return torch.cat([linear(rows, self.weights[g], self.biases[g]) for g in groups], -1)
        multiply = torch.ops.mkl._mkl_linear
        return torch.cat(
            [multiply(rows, self.packed[g], self.weights[g], self.biases[g], len(rows)) for g in groups], -1
        )


def pack_linears(model: nn.Module) -> bool:
    """Turn the float32 linear layers of a frozen model on the CPU into packed ones, in place.

    Returns:
        False, with nothing changed, where it cannot be done or does not pay: another device or dtype, a build
        of torch without MKL, or less free memory than twice the copy of the weights that packing makes.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    if not _can_pack([module.weight for module in linears]):
        return False
    for module in linears:
        module.__class__ = PackedLinear
    return True


def _can_pack(weights: Sequence[Tensor]) -> bool:
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return (
        torch.backends.mkl.is_available()
        and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
        and psutil.virtual_memory().available >= 2 * size
    )


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), MOST_ROWS)
