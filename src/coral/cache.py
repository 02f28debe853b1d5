"""The KV cache of one sequence: preallocated, appended to, and compacted in place to the accepted path.

Shapes: keys and values are [1, kv_heads, rows, head_dim] in the dtype and on the device of what is appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from transformers.cache_utils import Cache, DynamicLayer


class _Buffer:
    """The keys and values of all layers, which are alike in shape, as one tensor [2 * layers, ...].

    So a path is moved in all layers at once: 0.03 ms instead of 0.9 for 32 layers.

    Attributes:
        whole: that tensor; None while not all layers lie in it, or where they are not alike.
    """

    def __init__(self, count: int, apart: bool) -> None:
        self.count, self.taken = count, -1 if apart else 0
        self.rows = torch.empty(0)

    @property
    def whole(self) -> Tensor | None:
        return self.rows if self.taken == self.count else None

    def take(self, like: Tensor, capacity: int) -> Tensor:
        """Zeros [B, kv_heads, capacity, head_dim], since a compiled forward reads free rows too, and a weight
        of 0 does not cancel a NaN.
        """
        shape = (*like.shape[:2], capacity, like.shape[3])
        if self.taken in (0, self.count):  # the first layer, or the first that grows
            self.rows, self.taken = like.new_zeros((self.count, *shape)), 0
        if self.rows.shape[1:] != shape or (self.rows.device, self.rows.dtype) != (like.device, like.dtype):
            self.rows, self.taken = torch.empty(0), -1  # for good
            return like.new_zeros(shape)
        self.taken += 1
        # A compiled forward copies layers out and back if it knows that they lie in one tensor.
        return from_dlpack(self.rows[self.taken - 1])


class KVLayer(DynamicLayer):
    """One layer's keys and values; `update` returns views, never copies of what is already there."""

    def __init__(self, capacity: int, buffer: _Buffer) -> None:
        super().__init__()
        self.capacity, self.length, self.buffer = capacity, 0, buffer

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.buffer.take(key_states, self.capacity)
        self.values = self.buffer.take(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states.shape[-2])
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, rows: int) -> None:
        """Make room for `rows` more rows."""
        if self.length + rows > self.capacity:
            self._grow(max(self.length + rows, 2 * self.capacity))

    def _grow(self, capacity: int) -> None:
        old_keys, old_values, self.capacity = self.keys, self.values, capacity
        self.lazy_initialization(old_keys, old_values)
        self.keys[:, :, : self.length] = old_keys[:, :, : self.length]
        self.values[:, :, : self.length] = old_values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


class KVCache(Cache):
    """All layers of one sequence.

    Args:
        apart: each layer is a tensor of its own, as layers on several devices must be.
    """

    layers: list[KVLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int, capacity: int, apart: bool = False) -> None:
        self.buffer = _Buffer(2 * num_layers, apart)
        super().__init__(layers=[KVLayer(capacity, self.buffer) for _ in range(num_layers)])

    @property
    def length(self) -> int:
        return self.layers[0].length

    @property
    def capacity(self) -> int:
        return self.layers[0].capacity

    @property
    def storage(self) -> list[Tensor]:
        """Keys and values of each layer in turn, [1, kv_heads, capacity, head_dim]."""
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]

    def reserve(self, rows: int, like: Tensor) -> None:
        """Make room for `rows` more rows; `like`: [1, kv_heads, any, head_dim], what they will be."""
        for layer in self.layers:
            if not layer.is_initialized:
                layer.lazy_initialization(like, like)
            layer.reserve(rows)

    def keep(self, start: int, rows: Sequence[int] = ()) -> None:
        """Keep rows [0, start) and start + rows (ascending), moved to directly follow; drop all others."""
        if rows and rows[-1] != len(rows) - 1:
            storage = self.storage if self.buffer.whole is None else [self.buffer.whole]
            place = 0
            while place < len(rows):  # they move forward, so that none is overwritten before
                row, count = rows[place], 1
                while place + count < min(row, len(rows)) and rows[place + count] == row + count:
                    count += 1  # rows side by side move together, as many as do not overlap
                if place != row:
                    to, source = (slice(start + first, start + first + count) for first in (place, row))
                    torch._foreach_copy_(
                        [tensor[..., to, :] for tensor in storage],
                        [tensor[..., source, :] for tensor in storage],
                    )
                place += count
        self.set_length(start + len(rows))

    def set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length


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


def pack_masks(lengths: list[int], masks: list[Tensor], new: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Who attends to whom in a packed forward: a block a sequence, no padding.

    Args:
        lengths: rows in each cache, all of which the new rows may attend to.
        masks: [n, n] bool, who of a sequence's new rows may attend to whom.
        new: [n] int64, their positions.

    Returns:
        The mask [1, rows, keys] and the keys' positions [1, keys].
    """
    blocks = [
        torch.cat([mask.new_ones(len(mask), length), mask], 1)
        for length, mask in zip(lengths, masks, strict=True)
    ]
    keys = [
        torch.cat([torch.arange(length, device=positions.device), positions])
        for length, positions in zip(lengths, new, strict=True)
    ]
    mask = blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks).bool()
    return mask[None], torch.cat(keys)[None]
