"""Write aside, then rename: nothing on disk is ever half-written, lost in between, or written by two at once.

A directory is replaced in one step of the kernel where it can exchange two names. Elsewhere it takes two
renames, and the next process that locks the output takes back what a kill between them left aside.
"""

import ctypes
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from uuid import uuid4

from coral.errors import CoralError
from coral.locks import locked

POINTER = "is a git-lfs pointer, not the file itself (run `git lfs pull` there)"
_LFS = b"version https://git-lfs"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_directory(path: Path, ours: Sequence[str] = ("*",)) -> Iterator[Path]:
    """Yield an empty directory beside `path`; on success it replaces `path`, on any failure it is removed.

    The new directory has the mode of the old one. A symbolic link stays, and what it names is replaced.

    Args:
        ours: patterns of what an old directory loses; its other files are carried over, unless they were
            written anew. Default: all.

    Raises:
        CoralError: `path` is a file, a mount point or holds the working directory, another process writes
            it, or the disk refuses the write (full, read-only, no permission).
    """
    path = replaceable(path)
    with locked(path), _explained(path):
        aside = path.with_name(f".{path.name}.new-{uuid4().hex}")
        aside.mkdir()
        try:
            mode = stat.S_IMODE((path if path.exists() else aside).stat().st_mode)
            aside.chmod(0o700)
            yield aside
            if path.exists():
                _carry_over(path, aside, ours)
            aside.chmod(mode)
            _settle(aside)
            _replace(aside, path)
            _flush(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def replaceable(path: Path) -> Path:
    """The directory that `path` names, links resolved.

    Raises:
        CoralError: it cannot be replaced: a file, what is or holds a mount point, where a process of ours
            works, or a name that is no UTF-8.
    """
    given, path = path, Path(os.path.realpath(path))
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # libraries beneath take no other names
        raise CoralError(f"the name {str(given)!r} is no UTF-8; choose another output.") from error
    if path.exists() and not path.is_dir():
        raise CoralError(f"{given} is a file, but a directory is to be written there; choose another output.")
    here = Path(os.path.realpath("."))
    if path in (here, *here.parents):
        raise CoralError(
            f"{given} holds the working directory, which cannot be replaced; choose a directory inside it."
        )
    for mounted in _mounts(path):
        if mounted != path:  # what is mounted there would be emptied with the old directory
            raise CoralError(f"{given} holds a mount point, {mounted}; unmount it, or choose another output.")
        raise CoralError(
            f"{given} is a mount point, which cannot be replaced; choose a directory inside it, such as "
            f"{given / 'output'}."
        )
    return path


def atomic_text(path: Path, text: str) -> None:
    """Replace the file at `path` with `text` in one step; raises CoralError when the disk refuses."""
    atomic_bytes(path, text.encode("utf-8", "surrogateescape"))


def atomic_bytes(path: Path, content: bytes) -> None:
    """Replace the file at `path` with `content` in one step; raises CoralError when the disk refuses."""
    with atomic_file(path) as aside:
        aside.write_bytes(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a name beside the file `path`; on success what was written there replaces it in one step, on any
    failure it is removed.

    The file keeps its mode. A symbolic link stays, and what it names is replaced.

    Raises:
        CoralError: the disk refuses.
    """
    path = Path(os.path.realpath(path))
    aside = path.with_name(f".{path.name}.{uuid4().hex}")  # process ids repeat on other nodes
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                aside.touch(0o600)
            yield aside
            if path.exists():
                shutil.copymode(path, aside)
            _flush(aside)
            aside.replace(path)
            _flush(path.parent)
        finally:
            with suppress(OSError):  # the parent may be a file
                aside.unlink(missing_ok=True)


def user_caches() -> Path | None:
    """The user's directory of caches, if there is one. A relative path would be one that others choose:
    whoever made the working directory.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    home = os.path.expanduser("~") if os.environ.get("HOME", "~") else ""  # noqa: PTH111
    caches = Path(named) if Path(named).is_absolute() else Path(home) / ".cache"
    return caches if caches.is_absolute() else None


def refuse_missing(source: str | Path, what: str) -> None:
    """Raise CoralError when `source` can only be a path, not a hub id, and nothing is there."""
    text = str(source)
    is_path = isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if is_path and not Path(source).exists():
        raise CoralError(f"there is no {what} directory {text}; check the path.")


def is_pointer(file: Path) -> bool:
    """Whether a file stands for one that git-lfs has not fetched."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS)) == _LFS
    except OSError:
        return False


def unreadable(error: Exception) -> str:
    """Why torch cannot read a file, in a few words: its own advice is to run what lies there."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if first.startswith("Weights only load failed"):
        return "it holds something else than tensors"
    return first.split(". ")[0].rstrip(".")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CoralError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another output."
        ) from error


def _carry_over(old: Path, new: Path, ours: Sequence[str]) -> None:
    """Give the files of one directory to another that lacks them, but for those that match `ours`."""
    for folder, folders, files in os.walk(old):
        for name in (*folders, *files):
            source = Path(folder, name)
            inside = source.relative_to(old)
            target = new / inside
            if any(fnmatch(inside.as_posix(), pattern) for pattern in ours) or os.path.lexists(target):
                continue
            if name in folders and not source.is_symlink():
                if not any(source.iterdir()):  # others are made for what they hold
                    target.mkdir(parents=True)
                    shutil.copymode(source, target)
                continue
            if not target.parent.exists():
                target.parent.mkdir(parents=True)
                shutil.copymode(source.parent, target.parent)
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:  # a file system without links
                shutil.copy2(source, target, follow_symlinks=False)


def _settle(directory: Path) -> None:
    """Have all of a directory on the disk, so that it is whole after a loss of power, once it is renamed."""
    for folder, _, files in os.walk(directory):
        for name in (*files, "."):
            _flush(Path(folder, name))


def _flush(path: Path) -> None:
    """Have a file or the names in a directory on the disk, where the file system can."""
    if path.is_symlink():
        return
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:  # not for this user to read
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.EROFS):
            raise  # a disk that is full, or broken
    finally:
        os.close(opened)


def _replace(new: Path, path: Path) -> None:
    """Put `new` where `path` is. What was there is removed, or left where `new` was."""
    if not path.exists():
        new.rename(path)
        return
    if _exchange(new, path):
        return
    old = path.with_name(f".{path.name}.old-{uuid4().hex}")
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:  # Ctrl-C included: whoever looks at `path` finds the old or the new directory
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the kernel or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # no Linux, or an old C library
        return False
    names = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _mounts(path: Path) -> list[Path]:
    """The mount points among a directory and what it holds, itself first."""
    own = [path] if os.path.ismount(path) else []
    try:  # a directory that is bound to another one of the same file system stands only here
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return own
    points = {re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), line.split()[4]) for line in lines}
    return own or sorted(point for point in map(Path, points) if point.is_relative_to(path))
