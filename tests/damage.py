"""One file of ours of each kind, how each is read, and ways in which disks and editors damage them."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiny_training import tiny_data, tiny_drafter, tiny_info, tiny_target

from coral.bench import log, results
from coral.bench.costs import Costs
from coral.bench.formulas import results_of
from coral.bench.records import Record
from coral.data import prepare, prepared, shards
from coral.data.prepared import PreparedData
from coral.data.write_shards import store
from coral.decoding.state import Cycle
from coral.drafters import checkpoint, tuned
from coral.hub.card import card
from coral.target.record import TargetRecord
from coral.tree import TreeSize

ODD = [None, True, -1, 0, 1.5, 10**30, 1e308, "", "x", "\udcff", [], [1], {}, {"a": 1}, float("nan")]
CONDITIONS = tuned.Conditions("a CPU", 4, "float32", "native", 8, "full")


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value, as its container and key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from nodes(inner)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One line with a value dropped or replaced by an odd one, or a few bytes cut or changed."""
    how = draw.randrange(5)
    if how < 3:
        lines = content.splitlines(keepends=True)
        lines = lines if content.startswith(b'{"settings"') else [content]
        at = draw.randrange(len(lines))
        value = json.loads(lines[at])
        container, key = draw.choice(list(nodes(value)))
        if how == 0:
            del container[key]
        elif how == 1:
            container[key] = copy.deepcopy(draw.choice(ODD))
        else:
            container[f"{key}x" if isinstance(container, dict) else key] = copy.deepcopy(container[key])
        lines[at] = json.dumps(value).encode() + b"\n"
        return b"".join(lines)
    at = draw.randrange(len(content))
    return content[:at] if how == 3 else content[:at] + draw.randbytes(3) + content[at + 3 :]


def a_record(method: str) -> Record:
    cycle = Cycle([3, 4], 2, 1, 1, 1, False, 0.1, 0.2, 0.4)
    kind = "plain" if method == "plain" else "drafter"
    return Record("float32", 0.0, False, kind, method, "s", "1", 0, [3, 4], 0.4, 0.1, 1, [cycle], "equal")


def a_bench(directory: Path) -> None:
    header = {
        "settings": {"max_new_tokens": 2, "deepen": None, "note": "", "drafters": {"a": "d"}},
        "commit": "c",
    }
    costs = Costs("float32", "eager", {"eager": 0.1}, 0.1, {1: 0.1, 4: 0.2}, {"a": 0.1})
    written = log.Log(directory / "records.jsonl", header)
    written.add(costs)
    written.add_trees("float32", {"a": {"tree_size": TreeSize(2, 3, 5), "origin": "default"}})
    for method in ("plain", "a"):
        written.add(a_record(method))
    environment = {"hardware": "x", "cores": 1, "threads": 1, "torch": "2", "transformers": "5",
                   "cpu_features": {"avx2": True}}  # fmt: skip
    found = {
        "environment": environment, "command": "coral bench", **header, "skipped": [], "trees": {},
        "target": {"name": "t", "layers": 2, "appended_ffn_width": None},
        "costs": {"float32": costs.to_json()}, "rows": results_of(written.records, written.costs),
        "routed_heads": {"float32": {"a": {"groups": 4, "active": 2, "core": 0, "recall": [0.5]}}},
    }  # fmt: skip
    (directory / "results.json").write_text(json.dumps(found))


def read_results(directory: Path) -> None:
    from coral.bench.report import markdown

    markdown(results.read(directory / "results.json"))


def resume_bench(directory: Path) -> None:
    header = {
        "settings": {"max_new_tokens": 2, "deepen": None, "note": "", "drafters": {"a": "d"}},
        "commit": "c",
    }
    again = log.Log(directory / "records.jsonl", header)
    results_of(again.records, again.costs)


def read_drafter(directory: Path) -> None:
    checkpoint.load(directory, tiny_target())
    card(directory, "me/drafter")


def read_prepared(directory: Path) -> None:
    info = prepared.load(directory).info
    prepared.report(info)
    prepared.check(info, 31)


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "drafter": ("coral/config.json", read_drafter),
    "trees": ("coral/trees.json", lambda directory: tuned.find(directory, CONDITIONS)),
    "features": ("features.json", shards.load),
    "prepared": ("coral.json", read_prepared),
    "held out": ("held_out.json", read_prepared),
    "records": ("records.jsonl", log.read),
    "a stopped bench": ("records.jsonl", resume_bench),
    "results": ("results.json", read_results),
}


def ours(directory: Path) -> None:
    """Write a file of each kind into one directory."""
    target = tiny_target()
    record, metrics = TargetRecord.of(target), {"updates": 1, "acceptance": {"tree": 2.0}}
    metrics["seconds"] = 2
    checkpoint.save(tiny_drafter(), directory, target=record, recipe={"recipe": "coral"}, metrics=metrics)
    tuned.save(directory, CONDITIONS, TreeSize(2, 3, 5), 1.5, 1.4)
    a_bench(directory)
    lines = ({**row, "loss_mask": row["loss_mask"]} for row in tiny_data(4).dataset)
    prepare._write_rows((prepare.Row(**row) for row in lines), directory)
    (directory / "coral.json").write_text(json.dumps(tiny_info(4)))
    (directory / "held_out.json").write_text("[[1, 2], [3]]")
    store(target, PreparedData(tiny_data(4).dataset, [[1, 2]], tiny_info(4)), directory / "features")
    for file in (directory / "features").iterdir():
        file.rename(directory / file.name)
