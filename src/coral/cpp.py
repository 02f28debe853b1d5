"""C++ sources of ours, built with torch's own tool for the processor at hand and kept in its cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def build(source: Path) -> bool:
    """Build a source, or find it built, and load it; it registers what it has as torch.ops.coral.

    Returns:
        False, with nothing done, where the compiler knows no vector unit of this processor.
    """
    from torch._inductor.codecache import CppCodeCache  # not for commands that never compile
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    if not valid_vec_isa_list():
        return False
    CppCodeCache.load(source.read_text(encoding="utf-8"), needs_vec_isa=True)
    return True
