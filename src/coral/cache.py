"""The KV cache of one sequence: preallocated, appended to, and compacted in place to the accepted path.

Shapes: L layers; keys and values of a layer are [B, kv_heads, rows, head_dim] in the dtype and on the device
of what is appended, with B = 1 but where prompts are padded to a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Block:
    """The rows of all layers on one device, in two tensors, so that a path is kept in two copies.

    keys, values: [L, B, kv_heads, capacity, head_dim], allocated when the first rows arrive.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.num_layers, self.capacity, self.allocated = num_layers, capacity, False

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Room for rows like `keys` and `values`, [B, kv_heads, rows, head_dim]."""
        # Zeros: a compiled forward reads free rows too, and a weight of 0 does not cancel a NaN.
        self.keys, self.values = (
            rows.new_zeros((self.num_layers, *rows.shape[:2], self.capacity, rows.shape[-1]))
            for rows in (keys, values)
        )
        self.allocated = True

    def grow(self, capacity: int) -> None:
        old, self.capacity = (self.keys, self.values), capacity
        self.allocate(self.keys[0], self.values[0])
        for new, rows in zip((self.keys, self.values), old, strict=True):
            new[..., : rows.shape[-2], :] = rows

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Move rows start + `rows` (ascending) of every layer to start."""
        if self.allocated and rows and rows[-1] != len(rows) - 1:
            index = torch.tensor(rows, device=self.keys.device) + start
            for tensor in (self.keys, self.values):  # the gather copies first: overlap is harmless
                tensor[..., start : start + len(rows), :] = tensor.index_select(-2, index)


class KVLayer(DynamicLayer):
    """One layer's rows in its block; `update` returns views, never copies of what is already there."""

    def __init__(self, block: Block, index: int) -> None:
        super().__init__()
        self.block, self.index, self.length = block, index, 0

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.block.allocated:
            self.block.allocate(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states.shape[-2])
        end = self.length + key_states.shape[-2]
        keys, values = self.block.keys[self.index], self.block.values[self.index]
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def reserve(self, rows: int) -> None:
        """Make room for `rows` more rows."""
        if self.length + rows > self.block.capacity:
            self.block.grow(max(self.length + rows, 2 * self.block.capacity))

    def get_seq_length(self) -> int:
        return self.length


class KVCache(Cache):
    """All layers of one sequence.

    Args:
        devices: where each layer is, for a model over several devices; None: all on one.
    """

    layers: list[KVLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int, capacity: int, devices: Sequence[Any] | None = None) -> None:
        sizes = [len(list(run)) for _, run in groupby(devices or [None] * num_layers)]
        self.blocks = [Block(size, capacity) for size in sizes]
        super().__init__(layers=[KVLayer(b, i) for b in self.blocks for i in range(b.num_layers)])

    @property
    def length(self) -> int:
        return self.layers[0].length

    @property
    def capacity(self) -> int:
        return self.blocks[0].capacity

    def keep(self, start: int, rows: Sequence[int] = ()) -> None:
        """Keep rows [0, start) and start + rows (ascending) in every layer; drop all others."""
        for block in self.blocks:
            block.keep(start, rows)
        self.set_length(start + len(rows))

    def set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length

    def batch_select_indices(self, indices: Tensor) -> None:
        for block in self.blocks:
            index = indices.to(block.keys.device)
            block.keys, block.values = block.keys[:, index], block.values[:, index]


class PackedLayer(DynamicLayer):
    """One layer of several sequences in one forward: rows are split by sequence, keys concatenated."""

    def __init__(self, layers: list[KVLayer], counts: list[int]) -> None:
        super().__init__()
        self.layers, self.counts = layers, counts

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        pieces = zip(
            self.layers, key_states.split(self.counts, -2), value_states.split(self.counts, -2), strict=True
        )
        keys, values = zip(*(layer.update(k, v) for layer, k, v in pieces), strict=True)
        return torch.cat(keys, -2), torch.cat(values, -2)

    def get_seq_length(self) -> int:
        return sum(layer.length for layer in self.layers)


def pack(caches: list[KVCache], counts: list[int]) -> Cache:
    """A cache that takes counts[b] rows of sequence b, packed in this order; one sequence needs no copy."""
    if len(caches) == 1:
        return caches[0]
    return Cache(
        layers=[PackedLayer(list(layers), counts) for layers in zip(*(c.layers for c in caches), strict=True)]
    )
