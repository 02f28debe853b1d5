"""Tries that disturb what is written: kills, two processes on one output, disks that are full."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tiny_pair import save_target

from coral.cli.main import main
from coral.data import prepared
from coral.data.prepare import PrepareConfig, prepare
from coral.drafters import checkpoint
from coral.target.target import Target

Try = Callable[[random.Random], None]


class Child(NamedTuple):
    """A process that runs a command, and where what it says can be read."""

    process: int
    reads: int

    def end(self) -> tuple[int, str]:
        """Wait for its end: its exit code, or -signal, and what it said."""
        with os.fdopen(self.reads, "rb") as told:
            said = told.read().decode(errors="replace")
        _, status = os.waitpid(self.process, 0)
        assert "Traceback" not in said, said[-3000:]
        return os.waitstatus_to_exitcode(status), said


class Commands:
    """Commands that write, the same each time, and what must hold of their outputs whenever they ended."""

    def __init__(self, place: Path) -> None:
        self.place, self.out = place, place / "out"
        save_target(place / "target")
        said = ({"role": "user", "content": f"ask {i}"} for i in range(8))
        records = [{"messages": [each, {"role": "assistant", "content": "say " * 9}]} for each in said]
        (place / "said.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (place / "suite.jsonl").write_text('{"id": 1, "turns": ["hi"]}\n{"id": 2, "turns": ["ho"]}\n')
        self.target = Target.load(place / "target")
        prepare([place / "said.jsonl"], self.target.tokenizer, place / "data", PrepareConfig(held_out=1))  # type: ignore[arg-type]
        common = f"--target {place}/target"
        train = f"train {common} --data {place}/data --output {self.out}/run --set reports.acceptance_every=0"
        self.lines = {
            "prepare": f"data prepare {place}/said.jsonl --tokenizer {place}/target --output {self.out}/data "
            "--held-out 1",
            "train": f"{train} --updates 3 --set reports.checkpoint_minutes=0 --set batch_size=2",
            "regenerate": f"data regenerate {place}/said.jsonl {common} --output {self.out}/r.jsonl "
            "--max-new-tokens 4 --batch-size 2",
            "features": f"data features {place}/data {common} --output {self.out}/f --shard-rows 2",
            "bench": f"bench --backend transformers {common} --suite {place}/suite.jsonl "
            f"--output {self.out}/bench --max-new-tokens 4 --drafter ngram",
        }

    def start(self, name: str, largest: int | None = None) -> Child:
        """Start a command. `largest`: no file may grow beyond so many bytes, as on a disk that is full."""
        reads, writes = os.pipe()  # which no limit of files concerns
        if child := os.fork():
            os.close(writes)
            return Child(child, reads)
        code = 70
        try:
            os.dup2(writes, 1)
            os.dup2(writes, 2)
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
            sys.argv = ["coral", *self.lines[name].split()]
            if largest is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            try:
                main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def whole(self, name: str) -> bool:
        """Whether the output is there and complete; raises AssertionError or CoralError if it is torn."""
        if name == "prepare":
            return (self.out / "data").exists() and len(prepared.load(self.out / "data").dataset) > 0
        if name == "train":
            return (self.out / "run").exists() and checkpoint.load(self.out / "run", self.target) is not None
        if name == "regenerate":
            file = self.out / "r.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            asked = [json.loads(line)["messages"][0]["content"] for line in lines if line.endswith("}")]
            assert len(set(asked)) == len(asked), f"a record is written twice: {asked}"
            return len(asked) == 8
        if name == "features":
            from coral.data import shards

            return (self.out / "f").exists() and shards.load(self.out / "f") is not None
        return (self.out / "bench" / "results.json").exists()

    def finish(self, name: str) -> None:
        """The same command again: it ends well, and its output is whole."""
        code, said = self.start(name).end()
        assert code == 0, f"{name} does not go on: exit code {code}\n{said[-1500:]}"
        assert self.whole(name), f"the output of {name} is not whole"
        stray = [path.name for path in self.out.rglob(".*") if re.search(r"\.(new|old)-", path.name)]
        assert not stray, f"left behind: {stray}"

    def clean(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()


def kills(place: Path) -> Try:
    """A command is killed at a random moment, up to three times; what was there is whole, and it goes on."""
    commands = Commands(place)
    seconds: dict[str, float] = {}

    def once(draw: random.Random) -> None:
        commands.clean()
        name = draw.choice([*commands.lines])
        if name not in seconds:
            begin = time.monotonic()
            commands.finish(name)
            seconds[name] = time.monotonic() - begin
            commands.clean()
        was_whole = False
        for _ in range(draw.randrange(1, 4)):
            child = commands.start(name)
            time.sleep(draw.random() * 1.1 * seconds[name])
            os.kill(child.process, signal.SIGKILL)
            child.end()
            if name in ("prepare", "train"):
                now = commands.whole(name)
                assert now or not was_whole, f"a kill lost the output of {name}"
                was_whole = now
        commands.finish(name)

    return once


def pairs(place: Path) -> Try:
    """Two processes write one output: each ends well, or says who holds it, and the output is whole."""
    commands = Commands(place)

    def once(draw: random.Random) -> None:
        commands.clean()
        name = draw.choice([*commands.lines])
        children = []
        for _ in range(2):
            children.append(commands.start(name))
            time.sleep(draw.choice([0, 0, 0.05, 0.3]))
        outcomes = [child.end() for child in children]
        for code, said in outcomes:
            assert code in (0, 2), f"{name}: exit code {code}\n{said[-1500:]}"
            assert code == 0 or "is being written by" in said, said[-1500:]
        assert 0 in dict(outcomes), f"{name}: neither wrote\n{outcomes}"
        assert commands.whole(name)

    return once


def full_disks(place: Path) -> Try:
    """No file may grow beyond some size: a sentence, what was there stays, and with room it goes on."""
    commands = Commands(place)

    def once(draw: random.Random) -> None:
        commands.clean()
        name = draw.choice([*commands.lines])
        had = draw.random() < 0.5 and name in ("prepare", "train")
        if had:
            commands.finish(name)
        code, said = commands.start(name, largest=draw.choice([0, 1, 100, 700, 2000, 9000, 20000])).end()
        assert code in (0, 2), f"{name}: exit code {code}\n{said[-1500:]}"
        assert not had or commands.whole(name), f"a full disk lost the output of {name}"
        commands.finish(name)

    return once
