"""Libraries of native code are kept for their user alone, and loaded only as they were built."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from ctypes import CDLL
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from coral.native import build as cpp

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no compiler")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], int]]:
    """Builds a library whose function returns a number, and calls it; torch's tool is left out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compilations = []

    def plain(name: str, text: str) -> CDLL:
        compilations.append(name)
        source, library = (
            Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / f"main.{end}" for end in ("cpp", "so")
        )
        source.write_text(text)
        subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
        return CDLL(str(library))

    monkeypatch.setattr(cpp, "_compile", plain)

    def run(number: int, asked: str | None = None) -> int:
        """How often the compiler ran until the function returned its number, in a process as if new."""
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", asked or "")
        if asked is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        cpp.build.cache_clear()
        cpp.use_own_cache.cache_clear()
        source = tmp_path / f"number{number}.cpp"
        source.write_text(f'extern "C" int number() {{ return {number}; }}')
        compilations.clear()
        library = cpp.build(source)
        assert library is not None and library.number() == number
        return len(compilations)

    yield run
    cpp.build.cache_clear()
    cpp.use_own_cache.cache_clear()


def kept(tmp_path: Path, number: int) -> Path:
    (library,) = (tmp_path / "cache" / "coral" / "compiled").glob(f"number{number}-*.so")
    return library


def test_a_torn_or_foreign_library_is_built_again(compiled, tmp_path: Path) -> None:
    """Stops a bus error from a file that a full disk cut, and code that somebody put there."""
    assert [compiled(1), compiled(1), compiled(2)] == [1, 0, 1]
    library, other = kept(tmp_path, 1), kept(tmp_path, 2)
    whole = library.read_bytes()
    for content in (whole[: len(whole) // 2], b"", whole[:-1] + b"\0\0", other.read_bytes()):
        library.unlink()  # the mapped one stays whole
        library.write_bytes(content)
        assert compiled(1) == 1
    for gone in (library, library.with_suffix(".sha256")):
        gone.unlink()
        assert compiled(1) == 1
    library.with_suffix(".sha256").write_bytes(b"\xff")
    assert compiled(1) == 1 and compiled(1) == 0
    folder = library.parent
    assert folder.stat().st_mode & 0o777 == 0o700 and not [p for p in folder.iterdir() if p.name[0] == "."]


@pytest.mark.parametrize("cache", ["", "cache", "./cache"])
def test_the_working_directory_is_no_cache(compiled, tmp_path: Path, monkeypatch, cache: str) -> None:
    """Stops a library that lies in somebody's repository from being run."""
    assert compiled(1) == 1
    place, home = tmp_path / "repository", tmp_path / "home"
    for folder in (place / cache / "coral", place / ".cache" / "coral"):
        shutil.copytree(tmp_path / "cache" / "coral", folder, dirs_exist_ok=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", str(home))
    assert compiled(1) == 1 and cpp.use_own_cache() == home / ".cache" / "coral" / "compiled"
    assert compiled(1, cache) == 0 and cpp.use_own_cache() == home / ".cache" / "coral" / "compiled"
    for nowhere in ("", "home"):
        monkeypatch.setenv("HOME", nowhere)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir(exist_ok=True)
        compiled(1)
        assert cpp.use_own_cache() == tmp_path / "temporary" / f"coral-{os.geteuid()}"


@pytest.mark.parametrize("asked", [".", "sub"])
def test_a_relative_place_for_temporary_files_is_no_cache(
    compiled, tmp_path: Path, monkeypatch, asked
) -> None:
    """Stops a library that lies in somebody's repository from being run where TMPDIR names that."""
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, value in {"HOME": "", "XDG_CACHE_HOME": "", "TMPDIR": asked}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert [compiled(1), compiled(1)] == [1, 1]
    assert not [*tmp_path.rglob(f"coral-{os.geteuid()}")]


def test_a_directory_that_others_may_write_is_not_used(compiled, tmp_path: Path, monkeypatch) -> None:
    """Stops code of another user, who may write a library and its digest alike."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    temporary = tmp_path / "temporary" / f"coral-{os.geteuid()}"
    temporary.mkdir(parents=True)
    folder = tmp_path / "cache" / "coral" / "compiled"
    assert compiled(1) == 1
    folder.chmod(0o755)
    assert compiled(1) == 0 and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert compiled(1) == 1 and cpp.use_own_cache() == temporary
    temporary.chmod(0o770)
    assert compiled(1) == 1
    assert cpp.use_own_cache().parent == temporary.parent and cpp.use_own_cache() != temporary
    assert compiled(1, str(folder)) == 1  # named, but not to be trusted
    assert compiled(1, str(tmp_path / "asked")) == 1 and cpp.use_own_cache() == tmp_path / "asked" / "coral"


@pytest.fixture
def own_cache() -> Iterator[None]:
    """The place of what is built is looked up once a process; here it changes."""
    cpp.use_own_cache.cache_clear()
    yield
    cpp.use_own_cache.cache_clear()


@pytest.mark.slow
def test_a_source_is_built_once_for_all_processes(own_cache, monkeypatch, tmp_path, capsys):
    """Stops two seconds of looking for vector units at the start of each command."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    assert cpp.build(source).one() == 1
    assert "Building one.cpp" in capsys.readouterr().err
    cpp.build.cache_clear()
    monkeypatch.setattr(cpp, "_build", None)
    assert cpp.build(source).one() == 1


def test_decoding_does_without_what_the_compiler_refuses(monkeypatch, tmp_path, capsys):
    """Stops a broken compiler from breaking commands that never asked to compile."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("no C++")
    assert cpp.build(source) is None
    assert "broken.cpp cannot be built" in capsys.readouterr().err


def test_kernels_outlive_the_machine(own_cache, monkeypatch, tmp_path):
    """Stops kernels in the directory for temporary files, which torch names in the environment by itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for named in (None, default_cache_dir()):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if named:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named)
        cpp.use_own_cache.cache_clear()
        cpp.use_own_cache()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "coral" / "compiled")
    cpp.use_own_cache.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
    cpp.use_own_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "chosen")
