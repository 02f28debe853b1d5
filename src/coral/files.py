"""Write aside, then rename: nothing on disk is ever half-written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from coral.errors import CoralError


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`; on success it replaces `path`, on any failure it is removed.

    Raises:
        CoralError: `path` is a file, or the disk refuses the write (full, read-only, no permission).
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise CoralError(f"{path} is a file, but a directory is to be written there; choose another output.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise CoralError(f"cannot write {path}: {error.strerror}; choose another output.") from error
    try:
        yield aside
        aside.chmod(0o755)
        old = path.parent / f".{path.name}.old-{os.getpid()}"
        try:
            if path.exists():
                path.rename(old)
            aside.rename(path)
        except BaseException:  # Ctrl-C included: whoever looks at `path` finds the old or the new directory
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        finally:
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CoralError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another output."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def atomic_text(path: Path, text: str) -> None:
    """Replace the file at `path` with `text` in one step; raises CoralError when the disk refuses."""
    atomic_bytes(path, text.encode())


def atomic_bytes(path: Path, content: bytes) -> None:
    """Replace the file at `path` with `content` in one step; raises CoralError when the disk refuses."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid4().hex}")  # process ids repeat on other nodes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        raise CoralError(
            f"cannot write {path}: {error.strerror}; free some space or choose another output."
        ) from error
    finally:
        with suppress(OSError):  # the parent may be a file
            aside.unlink(missing_ok=True)


def refuse_missing(source: str | Path, what: str) -> None:
    """Raise CoralError when `source` can only be a path, not a hub id, and nothing is there."""
    text = str(source)
    is_path = isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if is_path and not Path(source).exists():
        raise CoralError(f"there is no {what} directory {text}; check the path.")
