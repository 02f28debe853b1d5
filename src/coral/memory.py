"""Keep freed memory in the process: training and decoding make and free large CPU tensors at every step.

glibc hands blocks above 32 MB back to the kernel at once, and the next tensor pays for fresh pages: on one
thread a product of 512 rows with a 32,000 x 256 head took 113 ms, and 67 ms once freed memory was kept
(`docs/log.md`).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
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


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Let Linux give a CPU tensor, which nothing was written to yet, pages of 2 MB: a processor reads ahead
    within a page only (a pass over 160 MB of weights: 5% less time).
    """
    if sys.platform == "linux":
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(0, size)), mmap.MADV_HUGEPAGE)
