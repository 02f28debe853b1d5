"""Rows of the target's LM head, which all cheaper heads are made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from coral.target.target import Target


class Table(NamedTuple):
    """A head that is linear: rows [K, h] float32 or bfloat16, bias [K] float32 or None, and the ids int64 [K]
    they score (None: 0 to K - 1).

    fixed: the rows are the same tensor every time, and stay as they are.
    """

    rows: Tensor
    bias: Tensor | None = None
    ids: Tensor | None = None
    fixed: bool = False


def rows_of(target: Target, ids: Tensor) -> nn.Linear:
    """The LM head's rows of some ids [K], as a layer that scores them alone."""
    bias = None if target.head_bias is None else target.head_bias[ids]
    return linear(target.head_weight[ids], bias)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen layer of these tensors, which are not copied: weight [K, h], bias [K]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer
