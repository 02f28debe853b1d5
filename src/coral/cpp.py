"""C++ sources of ours, built with torch's own tool for the processor at hand and kept in its cache."""

from __future__ import annotations

import os
import re
import shutil
import sys
from ctypes import CDLL
from functools import cache
from hashlib import sha256
from pathlib import Path

from coral.errors import CoralError
from coral.files import atomic_text

_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"


def has_compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")))


def use_own_cache() -> None:
    """Keep what is built where it outlives the machine, unlike in the directory for temporary files."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    own = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "coral" / "compiled"
    if os.environ.get(_CACHE_DIR, default_cache_dir()) == default_cache_dir():  # torch sets it when imported
        os.environ[_CACHE_DIR] = str(own)


def _with_headers(source: Path) -> str:
    """The text of a source with our own headers in it, since torch compiles a copy elsewhere."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    ours = re.compile(r'#include "(.*)"')
    return "".join(_with_headers(source.parent / m[1]) if (m := ours.match(line)) else line for line in lines)


@cache
def build(source: Path) -> CDLL | None:
    """A source, built once for all processes, as a library. None where that cannot be: no compiler, one that
    knows no vector unit of this processor, or that fails, which is said.
    """
    import torch

    use_own_cache()
    text = _with_headers(source)
    made_for = torch.__version__, torch.backends.cpu.get_cpu_capability(), text
    key = sha256(repr(made_for).encode()).hexdigest()[:16]
    known = Path(os.environ[_CACHE_DIR]) / f"{source.stem}-{key}"  # the path of the library
    try:
        # To ask torch, whose compiler tries out this processor first, takes two seconds.
        if known.exists() and (library := Path(known.read_text(encoding="utf-8"))).exists():
            return CDLL(str(library))
        return _build(source.name, text, known)
    except (OSError, RuntimeError, CoralError) as error:  # RuntimeError: the compiler's
        print(f"{source.name} cannot be built, so decoding does without: {error}"[:500], file=sys.stderr)
        return None


def _build(name: str, text: str, known: Path) -> CDLL | None:
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    if not has_compiler() or not valid_vec_isa_list():
        return None
    print(f"Building {name} for this processor, once: half a minute ...", file=sys.stderr)
    library: CDLL = CppCodeCache.load(text, needs_vec_isa=True)
    atomic_text(known, library._name)
    return library
