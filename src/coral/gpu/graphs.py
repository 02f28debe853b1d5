"""Forwards that a GPU replays: CUDA graphs.

A forward over a few rows is hundreds of kernels of a few microseconds each, and to launch one takes the host
as long as it runs. A graph is recorded once, and launched as one. It reads and writes where it did when it
was recorded, and it does what was done then: shapes are fixed, and nothing may be waited for (`device.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WARM_UPS = 3  # calls before the recording, in which kernels are compiled, tuned and loaded


class _Graph(NamedTuple):
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], Any]


class Replayed:
    """A function of tensors, recorded for each set of shapes and storage that it meets.

    The recording of a storage that is gone is used again where another of the same size has taken its place,
    as torch's allocator has it for text after text; see `steady`.

    Args:
        function: takes `inputs` tensors, which are copied to where a graph reads them, and then the storage
            of a cache, which is read and written where it lies. Returns a tensor or a tuple of tensors.
        most: recordings that are kept, those used last.
    """

    def __init__(self, function: Callable[..., Any], inputs: int, most: int = 32) -> None:
        self._function, self._inputs, self._most = function, inputs, most
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()

    def __call__(self, *tensors: Tensor) -> Any:
        given, storage = tensors[: self._inputs], tensors[self._inputs :]
        key = *(each.shape for each in given), *((each.data_ptr(), each.shape) for each in storage)
        graph = self._graphs.pop(key, None) or self._record(given, storage)
        self._graphs[key] = graph
        if len(self._graphs) > self._most:
            self._graphs.popitem(last=False)
        for own, new in zip(graph.inputs, given, strict=True):
            own.copy_(new)
        graph.replay()
        first, *others = (each.clone() for each in graph.outputs)  # the next replay writes over them
        return (first, *others) if others else first

    def _record(self, given: tuple[Tensor, ...], storage: tuple[Tensor, ...]) -> _Graph:
        self._function(*given, *storage)  # as marked for the compiler, where it is to know no length
        inputs = [each.clone() for each in given]
        outputs, replay = record(lambda: self._function(*inputs, *storage))
        return _Graph(inputs, outputs if isinstance(outputs, tuple) else (outputs,), replay)


def record(run: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
    """What `run` returns, and what computes it anew in the same place: `run` as a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = run()
    return returned, graph.replay


def steady(capacity: int) -> int:
    """A cache's capacity where its forwards are recorded: a power of 2 up to 2048, then a multiple of that,
    so that many texts share a recording.
    """
    return max(256, 1 << (capacity - 1).bit_length()) if capacity <= 2048 else -(-capacity // 2048) * 2048
