"""docs/demo.svg: what `coral demo` shows in a terminal.

python benchmarks/picture.py docs/demo.svg
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 104


def shown() -> str:
    """The demo's standard output, with its colours."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "coral", "demo", "--max-new-tokens", "64"]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment) as demo:
        os.close(theirs)
        found = b""
        while piece := _read(ours):
            found += piece
    assert demo.returncode == 0, "the demo failed"
    return found.decode().replace("\r\n", "\n")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # the other end is closed
        return b""


if __name__ == "__main__":
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere)
        console.print(Text.from_ansi(shown()))
    console.save_svg(sys.argv[1], title="coral demo")
