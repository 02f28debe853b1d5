"""A gate that says that drafting changes nothing: each test names a way in which it could say so falsely."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import tiny_tokenizer

from coral.bench import gate, methods
from coral.bench.gate import failures, gates_of
from coral.bench.records import Record
from coral.bench.report import markdown
from coral.suites.follow_eval import items

FEW = items()[:4]
SHORT = ("--max-new-tokens", 6, "--limit", 4, "--backend=transformers")


@pytest.mark.parametrize("temperature", [0, 1])
def test_drafting_does_not_change_what_is_followed(
    coral: Callable[..., Any], models: Path, tmp_path: Path, temperature: float
) -> None:
    """Stops a drafter that changes which instructions a target follows, and a gate that compares nothing."""
    drafters = ("--drafter", f"mine={models / 'drafter'}", "--drafter", "ngram")
    options = ("--output", tmp_path, "--temperature", temperature)
    done = coral("bench", "--gate=follow_eval", "--target", models / "target", *drafters, *SHORT, *options)
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "results.json").read_text())
    (found,) = results["gates"]
    assert found["plain"].keys() == {item.id for item in FEW}
    assert {each["drafter"]: each["identical"] for each in found["compared"]} == {"mine": True, "ngram": True}
    assert all((each["equal"], each["wrong"]) == (4, 0) for each in found["compared"])
    assert {row["suite"] for row in results["rows"]} == {"follow_eval", "all"}
    text = (tmp_path / "results.md").read_text()
    name = "mine, coupled" if temperature else "mine"
    assert f"| {name} | 4 equal | identical |" in text and "| zh | 0/1 |" in text


def test_a_planted_difference_is_caught(
    coral: Callable[..., Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops a gate that is open whatever drafters write: here one answers what the target does not know."""
    knows = next(item for item in FEW if item.id == "commonsense-en-01")
    answer = tiny_tokenizer()(knows.passes, add_special_tokens=False)["input_ids"]
    ours = methods.ours

    def planted(*arguments: Any) -> methods.Write:
        def write(*asked: Any) -> methods.Written:
            written = ours(*arguments)(*asked)
            return methods.Written(answer, written.seconds, written.prefill_seconds, written.num_cycles, [])

        return write

    monkeypatch.setattr(methods, "ours", planted)  # for drafters; plain decoding has its own
    command = ("bench", "--gate=follow_eval", "--target", models / "target", "--drafter", "ngram", *SHORT)
    done = coral(*command, "--output", tmp_path)
    assert done.code == 1 and "ngram is judged otherwise" in done.err and "Traceback" not in done.err
    (found,) = json.loads((tmp_path / "results.json").read_text())["gates"]
    assert found["compared"][0]["differs"] == [knows.id] and not found["compared"][0]["identical"]
    text = (tmp_path / "results.md").read_text()
    assert f"| ngram | 4 **wrong** | **other at {knows.id}** |" in text


def test_a_gate_without_a_drafter_does_not_hold(
    coral: Callable[..., Any], models: Path, tmp_path: Path
) -> None:
    """Stops a gate that passes since nothing was to be compared, and one of a name that nobody has."""
    command = ("bench", "--target", models / "target", *SHORT, "--output", tmp_path)
    for drafter in ((), ("--drafter", "plain")):
        alone = coral(*command, "--gate", "follow_eval", *drafter)
        assert alone.code == 2 and "name one with --drafter" in alone.err and not [*tmp_path.iterdir()]
    unknown = coral(*command, "--gate", "follow")
    assert unknown.code == 2 and "there is no gate 'follow'" in unknown.err


def records(*texts: tuple[str, str, str, Any]) -> list[Record]:
    """Records by method, item, text and the equality check's verdict; a text's ids are its characters."""
    shared: dict[str, Any] = {"dtype": "bfloat16", "temperature": 0.0, "coupled": False, "turn": 0,
                              "suite": "follow_eval", "num_cycles": 1, "cycles": [], "seconds": 1.0,
                              "prefill_seconds": 0.5}  # fmt: skip
    return [
        Record(**shared, kind="plain" if method == "plain" else "drafter", method=method, prompt=item,
               tokens=[*map(ord, text)], verdict=equality)
        for method, item, text, equality in texts
    ]  # fmt: skip


def test_a_near_tie_is_named_and_excused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops rounding that fails the gate, a wrong text that hides behind it, and a peer of other numbers."""
    one, two = "string-en-02", "logic-en-03"
    good, bad = {one: "laroc", two: "48"}, {one: "larco", two: "36"}
    found = records(
        *(("plain", id, good[id], "equal") for id in (one, two)),
        *(("tie", id, bad[id] if id == one else good[id], "near_tie") for id in (one, two)),
        ("broken", one, bad[one], "near_tie"),
        ("broken", two, bad[two], "wrong"),
        ("hf_generate", one, bad[one], None),
        ("broken", "an id of another file", "", "wrong"),
        ("broken", "space-en-03", "6", "equal"),  # whose plain text a stopped bench has not written yet
    )
    (result,) = gates_of(found, lambda ids: "".join(map(chr, ids)))
    tie, broken = result["compared"]
    assert (tie["differs"], tie["excused"], tie["identical"]) == ([], [one], False)
    assert (broken["differs"], broken["excused"], broken["wrong"]) == ([two], [one], 1)
    monkeypatch.setattr(gate, "read", lambda path: {"gates": [result]})
    (sentence,) = failures(tmp_path)
    assert sentence == f"broken is judged otherwise than plain decoding at {two} (bfloat16, T = 0)"
    monkeypatch.setattr(gate, "read", lambda path: {"gates": [{**result, "compared": []}]})
    assert "were compared" in failures(tmp_path)[0]
    text = "\n".join(gate.markdown(result))
    poor = {**result, "plain": dict.fromkeys(result["plain"], False)}
    assert "passes none" in "\n".join(gate.markdown(poor)) and "passes none" not in text
    assert f"| tie | 2 near ties | other at near ties: {one} |" in text
    assert f"**other at {two}**; other at near ties: {one}" in text
    assert "| en | 1/1 | - | 1/1 | - | - | 2/2 |" in text


def test_results_of_before_there_were_gates_are_read(models: Path) -> None:
    """Stops a report of an old bench that ends in a traceback."""
    empty: dict[str, Any] = {
        "rows": [],
        "command": "c",
        "commit": "d",
        "skipped": [],
        "target": {"name": "t"},
    }
    settings = {"max_new_tokens": 1, "deepen": None, "note": ""}
    where = {"hardware": "h", "cores": 1, "threads": 1, "torch": "t", "transformers": "t", "cpu_features": {}}
    assert "follow_eval" not in markdown({**empty, "settings": settings, "environment": where})
