"""The id that is written, out of many, natively on the CPU: `sampler.cpp`, the fast twin of what
`decoding/sampling.py` does with torch.

Beside a native forward, torch's argmax and its noise for every id would take a fifth of the time. Only
where a target is run natively is this loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, c_bool, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from coral.native.build import build
from coral.native.packing import DTYPES

_loaded: list[CDLL] = []


def load() -> None:
    """From now on, take the native code if it can be built."""
    if not _loaded and (library := build(Path(__file__).with_suffix(".cpp"))) is not None:
        _loaded.append(library)


def argmax(scores: Tensor) -> Tensor:
    """[N, V] -> [N] int64, as torch's; of equal scores the first wins."""
    if not _loaded or scores.device.type != "cpu" or scores.dtype not in DTYPES:
        return scores.argmax(-1)
    rows, ids = scores.contiguous(), torch.empty(len(scores), dtype=torch.int64)
    narrow = c_bool(rows.dtype == torch.bfloat16)
    _loaded[0].coral_largest(_data(rows), narrow, *_sizes(rows), _data(ids))
    return ids


def sample(scores: Tensor, positions: Tensor, streams: Sequence[int]) -> Tensor | None:
    """[N, V] processed float32 scores, [N] positions -> [N] int64, the argmax under the noise of each row's
    stream (`Sampling.stream`). None: not here.
    """
    if not _loaded or scores.device.type != "cpu":
        return None
    rows, ids = scores.contiguous(), torch.empty(len(scores), dtype=torch.int64)
    seeds = torch.tensor(streams, dtype=torch.uint64)
    positions = positions.to(torch.int64).contiguous()
    _loaded[0].coral_sample(_data(rows), _data(positions), _data(seeds), *_sizes(rows), _data(ids))
    return ids


def _data(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _sizes(rows: Tensor) -> tuple[c_int64, c_int64, c_int64]:
    return c_int64(rows.shape[0]), c_int64(rows.shape[1]), c_int64(torch.get_num_threads())
