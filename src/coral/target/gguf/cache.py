"""Converted GGUF files, kept under ~/.cache/coral/gguf: one directory for each content and dtype.

The one that was used longest ago goes when all together exceed CORAL_CACHE_GB gigabytes (50 if unset).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coral import json_file
from coral.errors import CoralError
from coral.files import atomic_directory, atomic_text, user_caches
from coral.locks import locked
from coral.target.gguf import names

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from coral.target.gguf.blocks import Blocks

VERSION = 1
"""Of what a conversion writes; another one is made again."""
RECORD = "coral.json"


@dataclass(frozen=True)
class Entry:
    """A conversion in the cache. `used`: seconds since the epoch; `size`: bytes."""

    path: Path
    source: str
    dtype: str
    size: int
    used: float


def root() -> Path:
    return (user_caches() or Path(tempfile.gettempdir())) / "coral" / "gguf"


def bound() -> int:
    """How many bytes are kept. Raises CoralError when CORAL_CACHE_GB is no number."""
    given = os.environ.get("CORAL_CACHE_GB", "50")
    try:
        return int(float(given) * 1e9)
    except ValueError as error:
        raise CoralError(f"CORAL_CACHE_GB is {given!r}; set it to a number of gigabytes.") from error


def directory(
    source: str | Path, dtype: str = "auto", revision: str | None = None, console: Console | None = None
) -> Path | None:
    """A plain Hugging Face directory of the GGUF file that `source` names (see `names.find`), converted
    unless it was before. None: it names no GGUF file.

    Args:
        dtype: of the weights; "auto" is bfloat16, and so is "packed": see `blocks`.
        console: shows a bar while it is converted.

    Raises:
        CoralError: no such file, or one that cannot be read exactly.
    """
    if (paths := names.find(source, revision)) is None:
        return None
    entry, dtype = _entry(paths, dtype)
    if not (entry / RECORD).is_file():
        _make(entry, paths, {"source": str(source), "dtype": dtype}, console)
    _touch(entry)
    return entry


def converted(source: str | Path, dtype: str, revision: str | None) -> tuple[list[Path], Path] | None:
    """The files that `source` names and their directory, as of `directory`, if it was made before."""
    if (paths := names.find(source, revision)) is None:
        return None
    entry, _ = _entry(paths, dtype)
    if not (entry / RECORD).is_file():
        return None
    _touch(entry)
    return paths, entry


def _touch(entry: Path) -> None:
    """Of all entries it was used last."""
    with suppress(OSError):  # a cache that cannot be written to
        os.utime(entry / RECORD)


def _entry(paths: Sequence[Path], dtype: str) -> tuple[Path, str]:
    """The directory of files in a dtype, which is known then."""
    dtype = "bfloat16" if dtype in ("auto", "packed") else dtype
    return root() / f"{_digest(paths)[:16]}-{dtype}-v{VERSION}", dtype


def blocks(source: str | Path, revision: str | None = None) -> Blocks:
    """The matrices of the GGUF file that `source` names, in its own blocks.

    Raises:
        CoralError: it names no GGUF file, or see `Blocks`.
    """
    from coral.target.gguf.blocks import Blocks

    if (paths := names.find(source, revision)) is None:
        raise CoralError(f"{source} is no GGUF file, so it has no blocks to keep packed; use dtype auto.")
    return Blocks.of(paths)


def _make(entry: Path, paths: Sequence[Path], record: dict[str, str], console: Console | None) -> None:
    import torch

    from coral.target.families import check_supported
    from coral.target.gguf.config import read_config
    from coral.target.gguf.convert import write
    from coral.target.gguf.file import read

    limit, file = bound(), read(paths)
    check_supported(read_config(file))  # before minutes of work
    with locked(entry, wait=True):  # other processes wait, and find it
        if not (entry / RECORD).is_file():
            with atomic_directory(entry) as aside:
                write(file, aside, getattr(torch, record["dtype"]), console)
                (aside / RECORD).write_text(json.dumps(record, indent=2))
    _evict(limit, keep=entry)


def tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the GGUF file that `source` names, without converting its weights. None: it names no
    GGUF file. Raises CoralError as `directory` does.
    """
    if (paths := names.find(source, revision)) is None:
        return None
    made = next(root().glob(f"{_digest(paths)[:16]}-*-v{VERSION}/{RECORD}"), None)
    if made is not None:
        return load_tokenizer(made.parent, str(source))
    from coral.target.gguf.file import read
    from coral.target.gguf.tokenizer import read_tokenizer

    found = read_tokenizer(read(paths))
    found.name_or_path = str(source)
    return found


def load_tokenizer(path: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a converted directory as it was written, under this name. `AutoTokenizer` would
    rebuild that of some families after their usual one, which need not be this file's.
    """
    from transformers import PreTrainedTokenizerFast

    found: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(path)
    found.name_or_path = name
    return found


def entries() -> list[Entry]:
    """What the cache holds, the last used first."""
    found = []
    for record in root().glob(f"*/{RECORD}"):
        with suppress(OSError, CoralError):  # another process deletes it
            said = json_file.read(record, dict[str, str], "")
            size = sum(path.stat().st_size for path in record.parent.rglob("*") if path.is_file())
            used = record.stat().st_mtime
            found.append(Entry(record.parent, said.get("source", "?"), said.get("dtype", "?"), size, used))
    return sorted(found, key=lambda entry: -entry.used)


def remove(entry: Entry) -> None:
    """Delete a conversion: first out of sight, so that nobody finds half of it."""
    aside = entry.path.with_name(f".{entry.path.name}.old-{os.getpid()}-{time.time_ns()}")
    with suppress(FileNotFoundError):  # another process was faster
        entry.path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _evict(limit: int, keep: Path) -> None:
    total = 0
    for entry in entries():
        total += entry.size
        if total > limit and entry.path != keep:
            remove(entry)
            total -= entry.size


def _digest(paths: Sequence[Path]) -> str:
    """SHA-256 of the files; remembered as long as their sizes and times stay what they were."""
    memory = root() / "digests.json"
    known: dict[str, tuple[int, int, str]] = {}
    with suppress(CoralError):  # it was never written, or is damaged: then they are read again
        known = json_file.read(memory, dict[str, tuple[int, int, str]], "")
    digests, changed = [], False
    for path in paths:
        real = path.resolve()
        stat = real.stat()
        mark, before = (stat.st_size, stat.st_mtime_ns), known.get(str(real))
        if before is None or before[:2] != mark:
            known[str(real)] = (*mark, _sha256(real))
            changed = True
        digests.append(known[str(real)][2])
    if changed:
        there = {name: value for name, value in known.items() if Path(name).exists()}
        atomic_text(memory, json.dumps(there, indent=1))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while piece := opened.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
