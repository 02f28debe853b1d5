"""The pair that is served, and a server of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import Server

import coral as library
from coral.api import LLM
from coral.tree import TreeSize


@pytest.fixture(scope="module")
def llm(models: Path) -> LLM:
    return library.load(models / "target", models / "drafter", tree=TreeSize(2, 3, 5), fallback=False)


class Slow:
    """A proposer that takes its time, as a real model does."""

    def __init__(self, proposer: Any) -> None:
        self.proposer, self.layers = proposer, proposer.layers

    def propose(self, *args: Any) -> Any:
        time.sleep(0.02)
        return self.proposer.propose(*args)


@pytest.fixture(scope="module")
def slow(llm: LLM) -> LLM:
    return LLM(llm.target, Slow(llm.proposer), llm.tree_size)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with Server(lambda: llm) as running:
        yield running.ready()
