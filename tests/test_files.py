"""Outputs survive whatever happens while they are written: kills at every step, two writers, odd places."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coral import files, locks
from coral.errors import CoralError
from coral.files import atomic_bytes, atomic_directory, atomic_text
from coral.locks import locked, locks_output

KILLED = """
import functools, os, shutil, signal, sys
from pathlib import Path
from coral import files
output, at, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
passed = 0
def step(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        global passed
        for moment in ("before", "after"):
            if passed == at:
                os.kill(os.getpid(), signal.SIGKILL)
            passed += 1
            if moment == "before":
                result = function(*args, **kwargs)
        return result
    return run
for place, names in ((Path, ("mkdir", "chmod", "rename", "write_text", "unlink")),
                     (os, ("link", "rmdir", "unlink")), (files, ("_exchange",))):
    for name in names:
        setattr(place, name, step(getattr(place, name)))
if not exchange:
    files._exchange = lambda one, other: False
with files.atomic_directory(output, ours=("weights", "stale")) as aside:
    (aside / "weights").write_text("new")
"""


def killed_at(step: int, output: Path, how: str) -> int:
    """The exit code of a process that replaces `output` and is killed at a step; 0: it had fewer steps."""
    command = [sys.executable, "-c", KILLED, output, str(step), how]
    return subprocess.run(command, check=False).returncode


def tree(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("how", ["exchange", "two renames"])
def test_a_kill_at_any_step_loses_nothing(tmp_path: Path, how: str) -> None:
    """Stops the moment between two renames, and asides of the dead that fill the disk."""
    if how == "exchange" and not files._exchange(_new(tmp_path / "a"), _new(tmp_path / "b")):
        pytest.skip("this file system cannot exchange two names")
    old = {"weights": "old", "README.md": "card", "heads/static": "head"}
    seen = set()
    for step in range(100):
        output = tmp_path / f"{step}" / "out"
        for name, text in {**old, "stale": "gone"}.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text(text)
        code = killed_at(step, output, how)
        if how == "exchange":
            assert output.is_dir()  # at every moment
        with locked(output):
            found = tree(output)
        assert found in ({**old, "stale": "gone"}, {**old, "weights": "new"})
        assert [path.name for path in output.parent.iterdir()] == ["out"]
        seen.add(found["weights"])
        if code == 0:
            break
        assert code == -9
    assert code == 0 and step > 12 and seen == {"old", "new"}


def _new(path: Path) -> Path:
    path.mkdir()
    return path


HOLDER = """
import sys, time
from coral.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_says_who_writes_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    """Stops two runs that write one output, and a lock that outlives its process."""
    output = tmp_path / "new" / "out.jsonl"
    with subprocess.Popen([sys.executable, "-c", HOLDER, output], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        refused = rf"out\.jsonl is being written by process {other.pid} \(-c "
        with pytest.raises(CoralError, match=refused), locked(output):
            pass
        with locked(tmp_path / "other"):
            pass
        other.kill()
        other.wait()
        with locked(output):
            pass
    assert (not list(tmp_path.rglob(".*")) and not output.parent.exists()) or not list(
        output.parent.iterdir()
    )


def test_one_thread_may_ask_again_and_all_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a command that waits for itself, and a lock that an error leaves behind."""

    @locks_output
    def write(source: str, output: Path) -> None:
        with locked(output), atomic_directory(output) as aside:
            (aside / "file").write_text(source)
            assert (tmp_path / ".out.lock").exists()

    write("text", output=tmp_path / "out")
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "out"):
        raise ZeroDivisionError
    assert tree(tmp_path) == {"out/file": "text"} and not locks._held
    monkeypatch.setenv("RANK", "1")  # the first process holds it for all
    with locked(tmp_path / "out"):
        assert not (tmp_path / ".out.lock").exists()


def test_an_output_keeps_its_place_and_its_mode(tmp_path: Path) -> None:
    """Stops a link that is replaced by a directory, and a private directory that all can read afterwards."""
    real = _new(tmp_path / "real")
    real.chmod(0o750)
    (tmp_path / "link").symlink_to(real)
    with atomic_directory(tmp_path / "link") as aside:
        assert aside.stat().st_mode & 0o777 == 0o700
        (aside / "a").write_text("1")
    assert (tmp_path / "link").is_symlink() and tree(real) == {"a": "1"}
    assert real.stat().st_mode & 0o777 == 0o750
    (real / "a").chmod(0o600)
    (tmp_path / "a").symlink_to(real / "a")
    atomic_text(tmp_path / "a", "2")
    assert (tmp_path / "a").is_symlink() and (real / "a").read_text() == "2"
    assert (real / "a").stat().st_mode & 0o777 == 0o600
    umask = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "fresh") as aside:
            (aside / "a").write_text("1")
        atomic_bytes(tmp_path / "file", b"1")
    finally:
        os.umask(umask)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops a shell that stands in a deleted directory, and "device or resource busy" after an hour."""
    inner = _new(_new(tmp_path / "out") / "inner")
    monkeypatch.chdir(inner)
    for output in (Path(), Path(".."), tmp_path / "out", tmp_path / "out" / "inner"):
        with (
            pytest.raises(CoralError, match=r"holds the working directory.*choose a directory inside"),
            atomic_directory(output),
        ):
            raise AssertionError
    for output in (Path("/proc"), Path("/")):
        with (
            pytest.raises(CoralError, match=r"(is a mount point|holds the working directory)"),
            atomic_directory(output),
        ):
            raise AssertionError
    bound = f"36 35 98:0 / {tmp_path}/with\\040space rw - ext4 /dev/sda rw\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, *a: bound if p.name == "mountinfo" else read(p, *a))
    with pytest.raises(CoralError, match=r"with space is a mount point.*choose a directory inside"):
        files.replaceable(_new(tmp_path / "with space"))
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with (
        pytest.raises(CoralError, match=re.escape(str(tmp_path / "round"))),
        atomic_directory(tmp_path / "round"),
    ):
        pass
    assert (tmp_path / "round").is_symlink()


def test_what_others_put_into_an_output_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops an empty directory of the user's from going, and a disk mounted inside an output from being
    emptied with what was replaced.
    """
    output = _new(tmp_path / "out")
    _new(_new(output / "mine") / "empty").chmod(0o750)
    with atomic_directory(output, ours=("weights",)) as aside:
        (aside / "weights").write_text("new")
    assert (output / "mine" / "empty").stat().st_mode & 0o777 == 0o750 and tree(output) == {"weights": "new"}
    inside = f"36 35 98:0 / {output}/mine rw - ext4 /dev/sda rw\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, *a: inside if p.name == "mountinfo" else read(p, *a))
    with pytest.raises(CoralError, match=rf"out holds a mount point, {output}/mine; unmount it"):
        files.replaceable(output)


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    """Stops a traceback of Arrow, after all work, from an output that it has no name for."""
    with pytest.raises(CoralError, match=r"is no UTF-8; choose another output"):
        files.replaceable(tmp_path / "\udcff")


def test_files_aside_of_the_dead_are_removed(tmp_path: Path) -> None:
    """Stops what a killed process wrote aside of a file from staying forever."""
    left = tmp_path / f".out.jsonl.{'0a' * 16}"
    left.write_text("half")
    (tmp_path / ".out.jsonl.mine").write_text("another's")
    with locked(tmp_path / "out.jsonl"):
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".out.jsonl.mine"]


def test_pytorchs_advice_to_run_what_lies_there_is_not_passed_on() -> None:
    """Stops "Re-running torch.load with weights_only=False will likely succeed" in a message of ours."""
    assert files.unreadable(ValueError("Weights only load failed. Re-running")) == (
        "it holds something else than tensors"
    )
    assert files.unreadable(EOFError()) == "EOFError"
