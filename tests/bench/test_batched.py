"""Throughput tables: the same texts in every batch, ratios of one run, and what cannot be measured."""

import json
from pathlib import Path

import pytest

from coral.bench import batched
from coral.bench.batched import bench_batched
from coral.bench.settings import BenchConfig
from coral.drafters.drafting import Drafting
from coral.errors import CoralError
from coral.target.target import Target


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"id": i, "turns": [f"ask {i} " * (i + 1)]}) + "\n" for i in range(5)))
    return file


def test_bench_writes_every_batch(
    coral, models: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops a batch that writes other texts, a drafter that is compared with another batch's plain decoding,
    and a table without padded rows, tau or verdicts.
    """
    monkeypatch.setattr(batched, "ROUNDS", 2)
    command = ("bench", "--target", models / "target", "--suite", suite, "--output", tmp_path / "out")
    command = *command, "--drafter", f"mine={models / 'drafter'}", "--max-new-tokens", 12
    done = coral(*command, "--batch", "1,3,4")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["name"], row["at_once"]) for row in results["rows"]] == [
        (name, at_once) for at_once in (1, 3, 4) for name in ("plain", "mine")
    ]
    for row in results["rows"]:
        assert row["verdicts"] == {"equal": 2 * 4} and row["padded_rows"] == 0
        assert len(row["ratios"]) == 2 and row["speed"] > 0 and row["tau"] >= 1
        assert row["name"] != "plain" or (row["ratios"], row["nodes"]) == ([1.0, 1.0], 0)
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.count("| 0 | 16 equal |") == 3 and "--batch 1,3,4" in table
    for bad in ("0", "2,", "many"):
        refused = coral(*command, "--batch", bad)
        assert refused.code == 2 and "no list of sizes" in refused.err


def test_a_text_that_differs_is_told(models: Path, suite: Path, tmp_path: Path) -> None:
    """Stops a table that hides a wrong text."""

    class Wrong:
        layers = ()

        def propose(self, states, tree_size):
            for state in states:
                state.tokens[-1] = 7
            return batched.Plain().propose(states, tree_size)

    class Drafts(Drafting):
        def proposer(self, target):
            return Wrong()

    target = Target.load(models / "target")
    path = bench_batched(target, {"bad": Drafts()}, str(suite), [2], tmp_path, BenchConfig(max_new_tokens=6))
    plain, bad = json.loads(path.read_text())["rows"]
    assert plain["verdicts"].keys() == {"equal"} and "wrong" in bad["verdicts"]
    with pytest.raises(CoralError, match="no prompt fits"):
        bench_batched(target, {}, str(suite), [1], tmp_path, BenchConfig(max_new_tokens=10_000))
