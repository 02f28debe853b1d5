"""One writer at a time: an output is locked while a command writes it.

The lock is the kernel's (flock), so it ends with the process that holds it, however that ends. It lies on
`.NAME.lock` beside the output, which says who holds it. Whoever takes it first takes back what a killed
process left aside, see `coral.files.atomic_directory`.
"""

import inspect
import os
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from coral.errors import CoralError

P = ParamSpec("P")
R = TypeVar("R")

_held: set[tuple[Path, int]] = set()  # by which threads of this process


@contextmanager
def locked(path: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only one that writes `path`, a file or a directory, there or not.

    A thread that holds the lock may take it again. Of the processes of a distributed run only the first takes
    it, for all. On a file system that has no locks nothing is locked.

    Args:
        wait: until another process has ended, instead of refusing.

    Raises:
        CoralError: another process writes it, which is named; or the disk refuses.
    """
    path = Path(os.path.realpath(path))
    key = path, threading.get_ident()
    if key in _held or os.environ.get("RANK", "0") != "0":
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock_file(path)
        descriptor = _take(file, path, wait)
    except OSError as error:
        raise CoralError(f"cannot write {path}: {error.strerror}; choose another output.") from error
    _held.add(key)
    try:
        with suppress(OSError):  # a folder that cannot be read
            _recover(path)
        yield
    finally:
        _held.discard(key)
        with suppress(OSError):
            file.unlink()  # before it is let go, so that nobody waits at a file that is gone
        os.close(descriptor)
        with suppress(OSError):
            for folder in made:  # if nothing was written
                folder.rmdir()


def locks_output(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with its argument `output` locked while it runs; see `locked`.

    Of the processes of one run the first holds the lock for all.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        output = signature.bind(*args, **kwargs).arguments["output"]
        with locked(output) if _is_first() else nullcontext():
            return function(*args, **kwargs)

    return alone


def _is_first() -> bool:
    distributed = sys.modules.get("torch.distributed")  # not imported for this
    if distributed and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return int(os.environ.get("RANK", 0)) == 0


def _lock_file(path: Path) -> Path:
    inside = path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK))
    return path / ".lock" if inside else path.with_name(f".{path.name}.lock")


def _recover(path: Path) -> None:
    """Take back the directory `path` that a killed process had moved aside, and remove what it left of a
    directory or a file: whoever made it is dead, for it would hold the lock.
    """
    named = re.compile(rf"\.{re.escape(path.name)}\.((new|old)-)?[0-9a-f]{{32}}")
    left = [each for each in path.parent.iterdir() if named.fullmatch(each.name)]
    if not path.exists() and (olds := [each for each in left if ".old-" in each.name]):
        newest = max(olds, key=lambda old: old.stat().st_mtime)
        newest.rename(path)
        left.remove(newest)
    for each in left:
        if each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
        else:
            each.unlink(missing_ok=True)


def _take(file: Path, path: Path, wait: bool) -> int:
    """A descriptor of `file`, which this process has locked."""
    import fcntl  # not on Windows, which may import this

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(descriptor, 4096).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise CoralError(
                f"{path} is being written by {holder}; wait until it has ended, or choose another output."
            ) from None
        except OSError:  # this file system has no locks
            return descriptor
        if _is(descriptor, file):
            break
        os.close(descriptor)  # whoever held it has removed the file meanwhile
    os.ftruncate(descriptor, 0)
    command = " ".join(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).split())[:1000]
    os.write(descriptor, f"process {os.getpid()} ({command})\n".encode("utf-8", "replace"))
    return descriptor


def _is(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
