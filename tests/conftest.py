"""One thread: tiny matrices run several times slower when four threads fight over them."""

import io
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny_pair import save_drafter, save_target

from coral.cli.main import main
from coral.decoding import row_costs
from coral.gpu.compiled import compiled
from coral.native import build as cpp
from coral.target import default as models_
from coral.target import second_start

torch.set_num_threads(1)
if flags := os.environ.get("CORAL_CXXFLAGS"):  # see test_sanitized.py
    cpp.FLAGS = tuple(flags.split())


@pytest.fixture(autouse=True, scope="session")
def starts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Those of tests do not push out a user's own, and what rows cost is not measured beside other tests."""
    folder = tmp_path_factory.mktemp("starts")
    second_start._root = lambda: folder
    row_costs.root = lambda: folder / "costs"
    row_costs.SECONDS = 0


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of fixed shape without a GPU: torch traces them as for one, in seconds, and runs them as they
    are.
    """

    def elsewhere(function: Callable[..., Any], device: torch.device, inputs: int) -> Callable[..., Any]:
        return compiled(function, torch.device("meta"), inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr("coral.target.forward.compiled", elsewhere)
    monkeypatch.setattr("coral.drafters.recurrent.grower.compiled", elsewhere)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy pair of the checkout where no target is named: the real one would have to be fetched."""
    monkeypatch.setattr(models_, "fetch", lambda: models_.TOY / "target")
    monkeypatch.setattr(models_, "DRAFTER", models_.TOY / "drafter")
    return models_.TOY


class Result(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def coral(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command line in this process, as if it had been typed."""

    def run(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["coral", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `target`, its untrained `drafter`, and `other`, a target with other weights."""
    directory = tmp_path_factory.mktemp("models")
    save_target(directory / "target")
    save_target(directory / "other", seed=1)
    save_drafter(directory / "drafter", directory / "target")
    return directory
