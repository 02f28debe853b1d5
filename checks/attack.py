"""`make attack`: whatever can be done to CORAL is done to it, at random, for a bounded time.

    python checks/attack.py --minutes 10 --seed 7
    python checks/attack.py --only records --seed 7 --tries 1 --first 4211     one try again

Each kind of try runs in a process of its own, which this one watches: an exception that is not a CoralError,
a broken promise, a signal and a hang are failures. Exit code 1 if there is one. docs/reliability.md says what
is promised, and what was counted.
"""

from __future__ import annotations

import argparse
import faulthandler
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import attack_inputs
import attack_native
import attack_outputs
import torch
from transformers.utils import logging

Try = Callable[[random.Random], None]
KINDS: dict[str, tuple[Callable[[Path], Try], float]] = {
    "mutated records": (attack_inputs.records, 1),
    "mutated files of ours": (attack_inputs.files, 2),
    "ids, trees and sizes": (attack_native.boundary, 3),
    "lossless texts": (attack_native.texts, 5),
    "kills": (attack_outputs.kills, 4),
    "pairs of processes": (attack_outputs.pairs, 3),
    "full disks": (attack_outputs.full_disks, 3),
}
"""How each kind is set up in a directory, and its share of the time."""
_HANG, _FAILURES = 120, 5  # seconds; tries that fail before a kind is given up
_STATE = struct.Struct("qq")  # the try that runs, or is next; whether it runs


class Outcome(NamedTuple):
    tries: int
    failures: list[str]


def attack(kind: str, seed: int, first: int, tries: int | None, seconds: float) -> Outcome:
    """Tries of one kind until the time is over, or so many. A try draws from seed, kind and number."""
    shared = mmap.mmap(-1, _STATE.size)
    failures: list[str] = []
    begin, at = time.monotonic(), first
    last = sys.maxsize if tries is None else first + tries
    while at < last and time.monotonic() - begin < seconds and len(failures) < _FAILURES:
        shared[:] = _STATE.pack(at, 0)
        with tempfile.TemporaryDirectory(prefix="attack-") as place:
            log = Path(place) / "log"
            worker = os.fork()
            if worker == 0:
                _work(kind, seed, last, begin + seconds, shared, Path(place), log)
            why = _watch(worker, shared)
            at, _ = _STATE.unpack(shared[:])
            if why is None:
                break
            told = log.read_text(errors="replace") if log.exists() else ""
            failures.append(f"{kind}, try {at} of seed {seed}: {why}\n{told}")
            at += 1
    return Outcome(at - first, failures)


def _work(kind: str, seed: int, last: int, end: float, shared: mmap.mmap, place: Path, log: Path) -> None:
    """In the worker: tries until one fails. Never returns."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(place)
    quiet = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    faulthandler.enable(quiet)  # where a signal struck
    sys.stdout = sys.stderr = os.fdopen(quiet, "w", buffering=1)
    try:
        (place / "work").mkdir()
        number, _ = _STATE.unpack(shared[:])
        shared[:] = _STATE.pack(number, 1)  # a set-up that fails is a failure, too
        once = KINDS[kind][0](place / "work")
        while number < last and time.monotonic() < end:
            shared[:] = _STATE.pack(number, 1)
            os.ftruncate(quiet, 0)
            os.lseek(quiet, 0, os.SEEK_SET)
            once(random.Random(f"{seed} {kind} {number}"))
            number += 1
            shared[:] = _STATE.pack(number, 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _watch(worker: int, shared: mmap.mmap) -> str | None:
    """Why a worker ended; None: its time was over."""
    seen, since = b"", time.monotonic()
    while True:
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            if os.WIFSIGNALED(status):
                return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
            return "failed" if os.WEXITSTATUS(status) else None
        if shared[:] != seen:
            seen, since = shared[:], time.monotonic()
        elif time.monotonic() - since > _HANG:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            return f"hangs for more than {_HANG} s"
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--only", action="append", help=f"kinds: {', '.join(KINDS)}")
    parser.add_argument("--tries", type=int, help="of each kind, at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first try")
    asked = parser.parse_args()
    kinds = [kind for kind in KINDS if not asked.only or any(kind.startswith(only) for only in asked.only)]
    if not kinds:
        parser.error(f"no kind is called {asked.only}; there are {', '.join(KINDS)}")
    seed = int.from_bytes(os.urandom(4), "big") if asked.seed is None else asked.seed
    torch.set_num_threads(1)  # a fork has no other threads
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print(f"seed {seed}, {asked.minutes:g} minutes", flush=True)
    shares = sum(KINDS[kind][1] for kind in kinds)
    outcomes = {}
    for kind in kinds:
        seconds = 60 * asked.minutes * KINDS[kind][1] / shares
        outcome = outcomes[kind] = attack(kind, seed, asked.first, asked.tries, seconds)
        print(f"{kind:24}{outcome.tries:8,} tries{len(outcome.failures):6,} failures", flush=True)
    tries = sum(outcome.tries for outcome in outcomes.values())
    failures = [failure for outcome in outcomes.values() for failure in outcome.failures]
    print(f"{'all':24}{tries:8,} tries{len(failures):6,} failures")
    for failure in failures:
        print(f"\n{failure[-4000:]}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
