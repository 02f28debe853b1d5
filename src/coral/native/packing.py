"""The weights of a target, copied into the panels in which native products read them: `packing.h`.

A verification multiplies some ten rows with every weight of the target. That should cost what one row costs,
since reading the weights takes longer than multiplying; libraries are made for one row or for hundreds. So
weights lie in the order in which they are read: blocks of 256 inputs; in each the panels of 16 outputs; in
each, input after input. Bfloat16 weights of two inputs stand together, in 32 bits. A GGUF file's own blocks
stay what they are, the numbers of sixteen outputs side by side behind their scales.

Nothing is joined or padded by torch first, so a target stands about as soon as its weights can be read and
written once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from ctypes import CDLL, POINTER, Structure, byref, c_bool, c_int64, c_uint64, c_void_p
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from coral.native.memory import weights_like

DTYPES = torch.float32, torch.bfloat16  # of rows; all arithmetic is float32
PANEL, LANES = 16, 16  # as in few_rows.h; lanes: the most there, of which sizes are multiples
BLOCKS = {"Q8_0": (2, 34, 544), "Q4_1": (3, 20, 320), "Q4_0": (4, 18, 288)}
"""What native products read as it is: its kind in blocks.h, bytes of a block of one output, of sixteen."""
_packed: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()


class _Parts(Structure):
    _fields_ = (
        ("count", c_int64),
        ("inputs", c_int64),
        ("weights", POINTER(c_void_p)),
        ("rows", POINTER(c_int64)),
        ("interleaved", c_bool),
    )


def pack(library: CDLL, weights: Sequence[Tensor], interleaved: bool = False) -> Tensor:
    """Matrices [rows, K], K even, one below another, as flat panels; rows of zeros fill the last one.

    Float32 weights that bfloat16 can hold, as those of most checkpoints, become bfloat16: the same numbers in
    half the bytes.

    Args:
        weights: of one dtype, float32 or bfloat16.
        interleaved: a panel of each in turn; their rows are whole panels then, and equally many.
    """
    weights = [weight.contiguous() for weight in weights]
    threads = c_int64(torch.get_num_threads())
    from_narrow = weights[0].dtype == torch.bfloat16
    library.coral_are_narrow.restype = c_bool
    narrow = from_narrow or all(
        library.coral_are_narrow(c_void_p(each.data_ptr()), c_int64(each.numel()), threads)
        for each in weights
    )
    parts, inputs = _parts(weights, interleaved), weights[0].shape[1]
    outputs = -(-sum(map(len, weights)) // PANEL) * PANEL
    packed = weights_like(torch.empty(outputs * inputs, dtype=torch.bfloat16 if narrow else torch.float32))
    to = c_void_p(packed.data_ptr())
    library.coral_pack(byref(parts), c_bool(from_narrow), c_bool(narrow), threads, to)
    return packed


def pack_blocks(
    library: CDLL, kind: str, weights: Sequence[Tensor], interleaved: bool = False
) -> tuple[int, Tensor]:
    """Rows of blocks, [rows, bytes] uint8 of this kind as in a GGUF file, one below another or interleaved as
    in `pack`: their kind as the library knows it, and flat panels.
    """
    number, stored, panel = BLOCKS[kind]
    panels = -(-sum(map(len, weights)) // PANEL)
    packed = weights_like(torch.empty(panels * (weights[0].shape[1] // stored) * panel, dtype=torch.uint8))
    parts, threads = _parts(weights, interleaved), c_int64(torch.get_num_threads())
    library.coral_pack_blocks(byref(parts), c_int64(number), threads, c_void_p(packed.data_ptr()))
    return number, packed


def _parts(weights: Sequence[Tensor], interleaved: bool) -> _Parts:
    count = len(weights)
    rows = (c_int64 * count)(*(len(each) for each in weights))
    pointers = (c_void_p * count)(*(each.data_ptr() for each in weights))
    return _Parts(count, weights[0].shape[1], pointers, rows, interleaved)


def pack_once(library: CDLL, weights: Sequence[Tensor], interleaved: bool, met: Counter[Any]) -> Tensor:
    """`pack`, shared by all forwards of this process that multiply with the same numbers.

    Args:
        met: weights of this forward so far. Those that are equal stay apart, as they are in the model: a
            deepened target is to cost what it weighs.
    """
    weights = [weight.contiguous() for weight in weights]
    content = *((each.shape, each.dtype, digest(library, each)) for each in weights), interleaved
    met[content] += 1
    key = content, met[content]
    packed = _packed.get(key)
    if packed is None:
        packed = _packed[key] = pack(library, weights, interleaved)
    return packed


def digest(library: CDLL, weight: Tensor) -> int:
    """A number that depends on every bit of a contiguous tensor of a multiple of eight bytes."""
    library.coral_digest.restype = c_uint64
    threads = c_int64(torch.get_num_threads())
    return int(library.coral_digest(c_void_p(weight.data_ptr()), c_int64(weight.nbytes // 8), threads))
