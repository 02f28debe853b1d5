"""The benchmark for GPUs, tried on the CPU at a tiny size."""

import json
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
RESULTS = SCRIPT.parent / "2026-11-21-float32-greedy" / "results.json"


@pytest.mark.parametrize("tau", [None, RESULTS])
def test_the_benchmark_runs_on_a_cpu(tau, tmp_path, monkeypatch, capsys):
    """Stops a command that is first tried on rented hardware, and taus or trees that are read wrongly."""
    options = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--repeats",
        "1",
        "--context",
        "32",
    ]
    options += [] if tau is None else ["--tau", str(tau)]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(tmp_path), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"environment", "command", "commit", "bandwidth"} <= results.keys()
    rows = results["rows"]
    assert {(r["way"], r["rows"]) for r in rows if r["what"] == "verify"} == {
        (way, n) for way in ("eager", "prepared") for n in (1, 8, 16, 32, 64)
    }
    draft = {r["head"]: r["bytes"] for r in rows if r["what"] == "draft"}
    assert list(draft) == ["full", "static", "routed", "in_context"]
    assert draft["full"] - draft["static"] == 4 * 64 * (512 - 128)
    assert draft["static"] - draft["in_context"] == 4 * 64 * (128 - 64)
    projected = results["projected"]
    assert len(projected) == (4 if tau is None else 7) * 2 * 4
    for row in projected:
        assert row["speedup_by_tau"] == pytest.approx(1 / (row["v"] + row["steps"] * row["c"]))
    cycles = results["cycles"]
    assert len(cycles) == 1 + 4 * 4 and all(row["seconds"] > 0 for row in cycles)
    assert all(row["speedup_by_tau"] == cycles[0]["seconds"] / row["seconds"] for row in cycles)
    if tau is not None:
        row = next(r for r in projected if r["tree"].startswith("shipped,"))
        assert row["tau"] == pytest.approx(3.008, abs=1e-3) and row["rows"] == pytest.approx(14.78, abs=0.01)
        assert row["speedup"] == pytest.approx(row["tau"] * row["speedup_by_tau"])


def test_a_prepared_verification_is_the_packages(monkeypatch):
    """Stops a time of another forward: another mask, other positions or no LM head."""
    from coral.decoding.state import State
    from coral.tree import DraftTree

    gpu = runpy.run_path(str(SCRIPT))
    target = gpu["build"](gpu["SHAPES"]["tiny"], torch.device("cpu"), torch.float32)
    torch.manual_seed(1)
    ids = torch.randint(512, (1, 14))
    monkeypatch.setattr(torch, "randint", lambda high, size, **kwargs: ids[:, : size[1]])
    state = State(ids[0, :10].tolist(), 30, target.new_cache(30))
    state.prefill(target, (-1,))
    for rows in (1, 5):
        chain = DraftTree(ids[0, 9 : 9 + rows], torch.arange(-1, rows - 1), torch.zeros(rows))
        expected = target.verify([state.cache], [chain])[0][0]
        state.cache.keep(9)
        with torch.inference_mode():
            forward = gpu["verification"](target, rows, 9)
            forward()
            torch.testing.assert_close(forward(), expected)
