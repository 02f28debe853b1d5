"""Forwards of one fixed shape, for `torch.compile`: padded rows, and a mask over the whole cache.

A plain step of a small model in eager mode spends half of its time on the dispatch of small operations;
compiled, it is one call. A length that grows would compile anew with every token, so rows are padded to a few
sizes, and attention runs over all rows that the cache has room for (that dimension is compiled as unknown).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from coral.cache import KVCache, KVLayer
from coral.errors import CoralError


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function` compiled for fixed shapes; on the CPU its weights are frozen in and packed.

    Raises:
        CoralError: compiling for the CPU needs a C++ compiler, and there is none.
    """
    run = torch.compile(function, dynamic=False)
    if device.type != "cpu":
        return run
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))):
        raise CoralError(
            "compiling needs a C++ compiler, and this machine has none; install g++, or do not compile "
            "(--no-compile)."
        )

    def frozen(*inputs: Any) -> Any:
        with torch._inductor.config.patch(freezing=True):
            return run(*inputs)

    return frozen


class FixedLayer(DynamicLayer):
    """One layer as a compiled forward wants it: rows go to given slots, and the whole buffer is returned."""

    def __init__(self, layer: KVLayer, slots: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slots, self.is_initialized = layer.keys, layer.values, slots, True
        torch._dynamo.mark_dynamic(self.keys, 2)
        torch._dynamo.mark_dynamic(self.values, 2)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.slots] = key_states
        self.values[:, :, self.slots] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0


class Fixed(NamedTuple):
    """The inputs of a forward over n rows, padded to a given number of rows and over the whole cache.

    ids [1, rows] and positions [1, rows] int64, allowed [1, rows, capacity] bool, key_positions [1, capacity]
    int64. Rows past the n given ones are written behind them in the cache and never attended to.
    """

    ids: Tensor
    positions: Tensor
    allowed: Tensor
    key_positions: Tensor
    cache: Cache


def fix(
    cache: KVCache, rows: int, ids: Tensor, positions: Tensor, allowed: Tensor, key_positions: Tensor
) -> Fixed:
    """Pad the inputs of a forward over n <= rows rows; the cache, not empty, counts these n as read.

    Args:
        ids, positions: [1, n]. allowed: [1, n, length + n] bool. key_positions: [1, length + n].
    """
    n, length, device = ids.shape[1], cache.length, ids.device
    for layer in cache.layers:
        layer.reserve(rows)
        layer.length += n
    slots = torch.arange(length, length + rows, device=device)
    more = rows - n, cache.layers[0].capacity - length - n
    allowed = pad(allowed, (0, more[1], 0, more[0]))
    allowed[:, n:, 0] = True  # a row that attends to nothing would be NaN
    layers: list[Any] = [FixedLayer(layer, slots) for layer in cache.layers]
    key_positions = pad(key_positions, (0, more[1]))
    torch._dynamo.mark_dynamic(allowed, 2)
    torch._dynamo.mark_dynamic(key_positions, 1)
    return Fixed(
        pad(ids, (0, more[0])),
        pad(positions, (0, more[0])),
        allowed,
        key_positions,
        Cache(layers=layers),
    )
