"""What the benchmarks of this directory write: what regenerates the numbers, the numbers, and their table."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from coral.bench.environment import commit, environment
from coral.files import atomic_text


def header(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware and software, this process's command and the commit: the first keys of results.json."""
    command = shlex.join(["python", *sys.argv])
    return {"environment": environment(device), "command": command, "commit": commit()}


def reproduce(results: dict[str, Any]) -> str:
    """The last line of results.md."""
    return f"Reproduce with `{results['command']}` at commit `{results['commit']}`."


def save(output: Path, results: dict[str, Any], markdown: str) -> None:
    """Write OUTPUT/results.json and OUTPUT/results.md."""
    output.mkdir(parents=True, exist_ok=True)
    atomic_text(output / "results.json", json.dumps(results, indent=1) + "\n")
    atomic_text(output / "results.md", markdown)


def show(output: Path, results: dict[str, Any], lines: list[str]) -> None:
    """Write the results with `lines` of markdown, end them with what regenerates them, and print them."""
    markdown = "\n".join([*lines, "", reproduce(results), ""])
    save(output, results, markdown)
    print(markdown)
