"""A short attack, and that the tool sees what it is to see."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKS = Path(__file__).parents[1] / "checks"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and limits as Linux has them")


@pytest.mark.slow
def test_a_short_attack() -> None:
    """Stops tracebacks, signals, hangs, losses and other texts, whichever of them comes back. A failure names
    its seed and number, which do it again.
    """
    command = [sys.executable, CHECKS / "attack.py", "--minutes", "0.25"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count(" 0 failures") == 8


def test_the_tool_sees_exceptions_signals_and_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops an attack that finds nothing because it cannot."""
    monkeypatch.syspath_prepend(str(CHECKS))
    attack = pytest.importorskip("attack")
    monkeypatch.setattr(attack, "_HANG", 1)
    ends = {
        3: lambda: 1 / 0,
        5: lambda: os.kill(os.getpid(), signal.SIGSEGV),
        7: lambda: time.sleep(30),
    }

    def numbered(place: Path) -> attack.Try:
        def once(draw: random.Random) -> None:
            at = int(Path("number").read_text()) if Path("number").exists() else 0
            Path("number").write_text(str(at + 1))
            print(draw.random())
            ends.get(at, lambda: None)()

        return once

    def broken(place: Path) -> attack.Try:
        raise KeyError("set-up")

    monkeypatch.setitem(attack.KINDS, "numbered", (numbered, 1))
    monkeypatch.setitem(attack.KINDS, "broken", (broken, 1))
    whole = attack.attack("numbered", 0, 0, 3, 60)
    assert whole == (3, [])
    (failure,) = attack.attack("numbered", 0, 0, 4, 60).failures
    assert "try 3 of seed 0: failed" in failure and "ZeroDivisionError" in failure
    ends[3] = ends[5]
    (failure,) = attack.attack("numbered", 0, 0, 4, 60).failures
    assert "killed by SIGSEGV" in failure and "in once" in failure
    ends[3] = ends[7]
    (failure,) = attack.attack("numbered", 0, 0, 4, 60).failures
    assert "hangs for more than 1 s" in failure
    outcome = attack.attack("broken", 0, 0, 100, 60)
    assert len(outcome.failures) == 5 and "KeyError" in outcome.failures[0]
