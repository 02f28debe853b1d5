"""Keep freed memory in the process: training and decoding make and free large CPU tensors at every step.

glibc hands blocks above 32 MB back to the kernel at once, and the next tensor pays for fresh pages: on one
thread a product of 512 rows with a 32,000 x 256 head took 113 ms, and 67 ms once freed memory was kept
(`docs/log.md`).
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # the command line is here before torch may be imported

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of any size; does nothing on other C libraries."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def trim() -> None:
    """Give freed pages back to the kernel, wherever they lie between blocks in use: where sizes differ from
    one update to the next, blocks fill their gaps badly and the heap grows for hours. To be called now and
    then, since every page comes back at a price.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def uncollected() -> Iterator[None]:
    """Load without looking for garbage: modules and weights are none, and the more of them there are, the
    longer a look takes. What was loaded is never looked at later, either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def seconds_alive() -> float:
    """For how long this process has run."""
    import psutil

    return time() - psutil.Process().create_time()


_PAGE, _CHUNK = 2 << 20, 64 << 20
_chunk: Tensor | None = None  # a tensor of bytes, of which the first `_used` are taken
_used = 0


def weights_like(weights: Tensor) -> Tensor:
    """An uninitialised contiguous CPU tensor like this one, for weights that are read again and again: in
    pages of 2 MB where Linux has them, since a processor reads ahead within a page only, and looks each up.

    Small tensors share a piece of memory, which is free when the last of them is.
    """
    import torch

    global _chunk, _used
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty_like(weights, memory_format=torch.contiguous_format)
    begin = -(-_used // 64) * 64
    if _chunk is None or begin + weights.nbytes > len(_chunk):
        memory = mmap.mmap(-1, max(_CHUNK, weights.nbytes) + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel that has none
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        _chunk, begin = whole[-whole.data_ptr() % _PAGE :], 0
    _used = begin + weights.nbytes
    return _chunk[begin:_used].view(weights.dtype).view(weights.shape)
