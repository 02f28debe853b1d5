"""`coral serve` in a process of its own on loopback, for the checks that are its clients."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

START = 300  # seconds that a server may take


class OwnServer:
    """One that runs. `memory`: bytes that it holds; `series`: one of its metrics, summed over labels."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self.url, self.process, self.log = port, f"http://127.0.0.1:{port}", process, log

    @property
    def memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def series(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return sum(map(float, re.findall(rf"^coral:{name}{{.*}} (.*)$", text, re.MULTILINE)))

    def is_idle(self, seconds: float) -> bool:
        """Whether every place becomes free in that time."""
        end = time.monotonic() + seconds
        while self.series("num_requests_running") + self.series("num_requests_waiting"):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


@contextmanager
def own_server(*options: object) -> Iterator[OwnServer]:
    """`coral serve` with these options, once it is ready; by default SmolLM2 and the shipped drafter."""
    with socket.socket() as found, tempfile.TemporaryDirectory() as name:
        found.bind(("127.0.0.1", 0))
        port, log = found.getsockname()[1], Path(name) / "log"
        found.close()
        command = [sys.executable, "-m", "coral", "serve", "--port", port, *options]
        with log.open("wb") as file:
            process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env=dict(os.environ))
        server = OwnServer(port, process, log)
        try:
            end = time.monotonic() + START
            while not _healthy(server.url):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
