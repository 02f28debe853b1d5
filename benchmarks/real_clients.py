"""Engines as processes: how real.py asks one of them, and how it keeps what they answer."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from real_table import Text

from coral.errors import CoralError


class ClientFailed(Exception):
    """A client ended before it had answered all; the message has the end of its log."""


def ask(
    python: Path, script: Path, job: Mapping[str, Any], log: Path, threads: int
) -> Iterator[dict[str, Any]]:
    """Run `python script JOB ANSWERS` to its end, and yield its answers, JSON objects, as they come.

    Args:
        log: where what the client prints goes, behind what is there.
        threads: of OpenMP and numba; vLLM binds its own to the first so many cores.

    Raises:
        ClientFailed: it ended with an error.
    """
    cores = f"0-{threads - 1}" if threads > 1 else "0"
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that a step is timed where it is made
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        **as_started(),
        "OMP_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": str(threads),  # vLLM's n-gram; numba's own number would become that of OpenMP
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    readable, writable = os.pipe()
    with tempfile.TemporaryDirectory() as scratch, log.open("ab") as printed:
        question = Path(scratch, "job.json")
        question.write_text(json.dumps(job))
        process = subprocess.Popen(
            [python, script, question, f"/dev/fd/{writable}"],
            pass_fds=(writable,),
            env=environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        os.close(writable)
        try:
            with os.fdopen(readable, encoding="utf-8") as answers:
                for line in answers:
                    yield json.loads(line)
            if process.wait():
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
                raise ClientFailed(f"ended with {process.returncode}; the end of {log}:\n{tail}")
        finally:
            process.kill()
            process.wait()


def as_started() -> dict[str, str]:
    """What this process was started with: coral says there how its threads wait, which is not for others."""
    entries = Path("/proc/self/environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return {name: value for name, found, value in (entry.partition("=") for entry in entries) if found}


class Records:
    """Texts, and what each method's client said of itself, on disk: one JSON object a line.

    The first line, the header, says which run they belong to; a line that was torn is written again.

    Attributes:
        texts: by method, round and prompt. clients: by method.

    Raises:
        CoralError: the file holds another run, or is no such file.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.texts: dict[tuple[str, int, str], Text] = {}
        self.clients: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        finished = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        try:
            found = [json.loads(line) for line in finished]
            for line in found[1:]:
                self._take(line)
        except (ValueError, KeyError, TypeError) as error:
            raise CoralError(f"cannot read {path} ({error}); choose another output or remove it.") from error
        if found and found[0] != json.loads(json.dumps(header)):
            raise CoralError(
                f"{path} holds a run with other settings, weights or of another commit; choose another "
                f"output or remove it."
            )
        with path.open("r+b" if found else "wb") as file:
            file.truncate(sum(len(line) + 1 for line in finished))
        if not found:
            self._append(header)

    def add(self, line: dict[str, Any]) -> None:
        """Append {"text": ...} or {"client": ...} to the file, then remember it."""
        self._append(line)
        self._take(line)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _take(self, line: dict[str, Any]) -> None:
        if "text" in line:
            text = Text(**line["text"])
            self.texts[text.key] = text
        else:
            self.clients[line["client"]["method"]] = line["client"]
