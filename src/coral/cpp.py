"""C++ sources of ours, built with torch's own tool for the processor at hand and kept in its cache."""

from __future__ import annotations

import os
import shutil
import sys
from ctypes import CDLL
from functools import cache
from hashlib import sha256
from pathlib import Path

_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"


def has_compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")))


def use_own_cache() -> None:
    """Keep what is built where it outlives the machine, unlike in the directory for temporary files."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    own = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "coral" / "compiled"
    if os.environ.get(_CACHE_DIR, default_cache_dir()) == default_cache_dir():  # torch sets it when imported
        os.environ[_CACHE_DIR] = str(own)


@cache
def build(source: Path) -> CDLL | None:
    """A source, built once for all processes, as a library. None without a compiler, or where it knows no
    vector unit of this processor.
    """
    import torch
    from torch._inductor.codecache import CppCodeCache  # not for commands that never compile
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    use_own_cache()
    if not has_compiler() or not valid_vec_isa_list():
        return None
    text = source.read_text(encoding="utf-8")
    content = sha256(f"{torch.__version__}{text}".encode()).hexdigest()
    built = Path(os.environ[_CACHE_DIR]) / f"{source.stem}-{content[:16]}"
    if not built.exists():
        print(f"Building {source.name} for this processor, once: half a minute ...", file=sys.stderr)
    library: CDLL = CppCodeCache.load(text, needs_vec_isa=True)
    built.touch()
    return library
