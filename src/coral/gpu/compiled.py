"""Forwards of one fixed shape for a GPU, for `torch.compile`: padded rows, and a mask over the whole cache.

A plain step of a small model in eager mode spends half of its time on the dispatch of small operations;
recorded, it is one call. A length that grows would compile anew with every token, so rows are padded to a few
sizes, and attention runs over all rows that the cache has room for (that dimension is compiled as unknown).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from coral.cache import KVCache, Layer
from coral.errors import CoralError
from coral.gpu.graphs import Replayed
from coral.native.build import use_own_cache


def compiled(function: Callable[..., Any], device: torch.device, inputs: int) -> Callable[..., Any]:
    """A function or bound method compiled for fixed shapes, on CUDA recorded and replayed.

    Args:
        inputs: how many tensors the function takes before the storage of a cache.

    Raises:
        CoralError: the device is a CPU, where native code is faster.
    """
    if device.type == "cpu":
        raise CoralError("graphs are recorded on a GPU; on a CPU use backend native or transformers.")
    use_own_cache()
    # Of the guards only those on tensors stay: those on the hundreds of modules took a tenth of a plain step.
    # Another model must then not find this one's graphs, which hang on the code object: hence one of its own.
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    run: Callable[..., Any] = torch.compile(_own_code(function), dynamic=False, options=options)
    return Replayed(run, inputs) if device.type == "cuda" else run


def _own_code(function: Any) -> Any:
    """The same function or bound method with a code object that no other has."""
    f = getattr(function, "__func__", function)
    copy = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return copy if f is function else MethodType(copy, function.__self__)


class FixedLayer:
    """One layer as a compiled forward wants it: rows go to given slots, and the whole buffer is returned."""

    length = 0

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        self.keys, self.values, self.slots = keys, values, slots

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[:, :, self.slots] = keys
        self.values[:, :, self.slots] = values
        return self.keys, self.values


def fixed_layers(slots: Tensor, storage: Sequence[Tensor]) -> Sequence[Layer]:
    """Layers over the keys and values of each in turn; made inside the compiled function, whose inputs then
    are tensors alone.
    """
    pairs = zip(storage[::2], storage[1::2], strict=True)
    return [FixedLayer(keys, values, slots) for keys, values in pairs]


def fix(cache: KVCache, rows: int, allowed: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What a forward over `rows` rows, of which the first n are real, needs of the cache (not empty).

    The cache counts these n as read. Rows behind them are written behind them and never attended to.

    Args:
        allowed: [1, n, length + n] bool.

    Returns:
        `allowed` padded to [1, rows, capacity]; the slots [rows] in the cache; its storage.
    """
    length, n = cache.length, allowed.shape[1]
    for layer in cache.layers:
        layer.reserve(rows)
    cache.set_length(length + n)
    allowed = pad(allowed, (0, cache.capacity - length - n, 0, rows - n))
    allowed[:, n:, 0] = True  # a row that attends to nothing would be NaN
    storage = cache.storage
    for tensor in (allowed, *storage):
        if not hasattr(tensor, "_dynamo_dynamic_indices"):  # keys and values were marked by the first call
            torch._dynamo.mark_dynamic(tensor, 2)
    return allowed, torch.arange(length, length + rows, device=allowed.device), storage
