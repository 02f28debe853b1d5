"""C++ sources of ours, built with torch's own tool for the processor at hand and kept for later processes.

A library is code that runs as its user. So it lies in a directory of that user alone, and is loaded only if
it is, byte for byte, what was built.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from functools import cache
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from coral import progress
from coral.errors import CoralError
from coral.files import atomic_bytes, atomic_text, user_caches
from coral.locks import locked

SOURCES = Path(__file__).parent
_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
FLAGS: tuple[str, ...] = ()
"""Of the compiler, beside torch's own: tests build with assertions (-DCORAL_DEBUG) and sanitizers."""


def has_compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")))


@cache
def use_own_cache() -> Path:
    """Let torch keep what it builds where it outlives the machine, unlike in the directory for temporary
    files; the directory of our own libraries.
    """
    caches, asked = user_caches(), os.environ.get(_CACHE_DIR, "")
    own = (caches and _own(caches / "coral" / "compiled")) or _private()
    # Torch sets it to its default when its compiler is imported, which takes seconds, and this function in a
    # process that started this one.
    given = asked != str(own) and not Path(asked).name.startswith("torchinductor_")
    if Path(asked).is_absolute() and given:
        return _own(Path(asked) / "coral") or own
    os.environ[_CACHE_DIR] = str(own)
    return own


def _own(folder: Path) -> Path | None:
    """The directory, made if need be, for this user alone; None: others own it, or may have written there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        foreign = hasattr(os, "geteuid") and status.st_uid != os.geteuid()
        if not stat.S_ISDIR(status.st_mode) or foreign or status.st_mode & 0o022:
            return None
        folder.chmod(0o700)
        return folder if os.access(folder, os.W_OK | os.X_OK) else None
    except OSError:
        return None


def _private() -> Path:
    """A directory of this user among those for temporary files; if that is not theirs alone, one of this
    process.
    """
    name = f"coral-{os.geteuid() if hasattr(os, 'geteuid') else 'compiled'}"
    shared = Path(tempfile.gettempdir()).absolute()
    asked = next(filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))), "/")
    here = shared == Path.cwd() or not Path(asked).is_absolute()  # where others may have put a library
    kept = None if here else _own(shared / name)
    return kept or Path(tempfile.mkdtemp(prefix=f"{name}-"))


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

    text = _with_headers(source)
    units = [
        torch.cpu._is_avx512_bf16_supported(),
        torch.cpu._is_vnni_supported(),
        torch.cpu._is_amx_tile_supported(),
    ]  # of which the compiler makes use, where it finds them
    made_for = torch.__version__, torch.backends.cpu.get_cpu_capability(), units, FLAGS, text
    key = sha256(repr(made_for).encode()).hexdigest()[:16]
    try:
        kept = use_own_cache() / f"{source.stem}-{key}.so"
        # To ask torch, whose compiler tries out this processor first, takes two seconds.
        if (library := _load(kept)) is not None:
            return library
        with locked(kept, wait=True):
            return _load(kept) or _build(source.name, text, kept)
    except (OSError, RuntimeError, CoralError) as error:  # RuntimeError: the compiler's
        print(f"{source.name} cannot be built, so decoding does without: {error}"[:500], file=sys.stderr)
        return None


def _load(kept: Path) -> CDLL | None:
    """The library that was kept, if it is what was built: to load a torn one is to be killed."""
    try:
        digest = kept.with_suffix(".sha256").read_text(encoding="ascii").strip()
        if sha256(kept.read_bytes()).hexdigest() != digest:
            return None
    except (OSError, ValueError):
        return None
    return CDLL(str(kept))


def _build(name: str, text: str, kept: Path) -> CDLL | None:
    if not has_compiler():
        return None
    with _fresh(kept):  # where nothing is that torch would take for what it has built
        library = _compile(name, text)
        if library is not None:
            content = Path(library._name).read_bytes()
            atomic_bytes(kept, content)
            atomic_text(kept.with_suffix(".sha256"), sha256(content).hexdigest() + "\n")
    return library


def _compile(name: str, text: str) -> CDLL | None:
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    if not valid_vec_isa_list():
        return None
    progress.step(f"Building {name} for this processor, once: half a minute", long=True)
    library: CDLL = CppCodeCache.load(text, needs_vec_isa=True, extra_flags=FLAGS)
    return library


@contextmanager
def _fresh(kept: Path) -> Iterator[None]:
    """Let torch build in an empty directory beside `kept`."""
    before = os.environ.get(_CACHE_DIR)
    folder = kept.with_name(f".{kept.name}.new-{uuid4().hex}")  # what a kill leaves goes with the next lock
    folder.mkdir(mode=0o700)
    os.environ[_CACHE_DIR] = str(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            del os.environ[_CACHE_DIR]
        else:
            os.environ[_CACHE_DIR] = before
