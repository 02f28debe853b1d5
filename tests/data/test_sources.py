"""Where conversations come from: every form gives the same records, one at a time, or says what is wrong."""

import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tiny_tokenizer import tiny_tokenizer

from coral.data.conversations import Conversation, Dropped, read
from coral.data.prepare import PrepareConfig, _digest, draw, prepare, set_aside
from coral.data.prepared import load
from coral.data.sources import records, size
from coral.errors import CoralError

MESSAGES = [
    [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}"}]
    for i in range(150)
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `datasets` takes ORG/NAME below it for a dataset, with no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


def test_every_form_gives_the_same_conversations_in_order(here: Path) -> None:
    """Stops: a form that loses, doubles or reorders records, or reads a null of a column for something."""
    rows = [{"messages": messages} for messages in MESSAGES]
    cut = [{**MESSAGES[0][1], "finished": False}]  # other rows then hold nulls in this column
    rows[7] = {"messages": [MESSAGES[7][0], *cut], "id": 3}
    half = len(rows) // 2
    sources: dict[str, list[str | Path]] = {
        "jsonl": [write_jsonl(here / "a.jsonl", rows)],
        "gz": [write_jsonl(here / "a.jsonl.gz", rows)],
        "parquet": [write_parquet(here / "a.parquet", rows)],
        "two": [write_parquet(here / "b.parquet", rows[:half]), write_jsonl(here / "c.jsonl", rows[half:])],
        "directory": [here / "d"],
        "hub parquet": ["hub:org/parquets"],
        "hub jsonl": ["hub:org/lines:train"],
    }
    write_parquet(here / "d" / "x" / "1.parquet", rows[:half])
    write_jsonl(here / "d" / "x" / "2.jsonl", rows[half:])
    (here / "d" / "README.md").write_text("not data")
    write_parquet(here / "org" / "parquets" / "data" / "train-00000-of-00002.parquet", rows[:half])
    write_parquet(here / "org" / "parquets" / "data" / "train-00001-of-00002.parquet", rows[half:])
    write_jsonl(here / "org" / "lines" / "train.jsonl", rows)
    expected = [m["messages"] for m in rows]
    for name, each in sources.items():
        dropped = Dropped()
        found = list(read(each, dropped))
        assert [conversation.messages for conversation in found] == expected, (name, dropped.notes)
        assert len({conversation.where for conversation in found}) == len(rows)
        assert size(each) == (None if name.startswith("hub") else len(rows)), name
    assert (
        found[0].where == "hub:org/lines:train:1"
        and next(read(["a.parquet"], dropped)).where == "a.parquet:1"
    )


def test_columns_and_what_they_hold(here: Path) -> None:
    """Stops: prompts that nobody can regenerate, and a column that hides the one with the conversation."""
    prompts = write_parquet(here / "p.parquet", [{"prompt": "ask", "text": "x"}])
    (asked,) = read([prompts], Dropped(), prompts_only=True)
    assert asked.messages == [{"role": "user", "content": "ask"}]
    assert not list(read([prompts], dropped := Dropped())) and dropped.counts == {
        "no assistant turn under 'prompt'": 1
    }
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    both = [{"conversations": shared, "prompt": "p"}, {"conversations": None, "prompt": "p"}]
    found = read([write_parquet(here / "b.parquet", both)], Dropped(), prompts_only=True)
    assert [[m["content"] for m in each.messages] for each in found] == [["q", "a"], ["p"]]
    listed = write_jsonl(here / "l.jsonl", [{"prompt": MESSAGES[0][:1]}, {"text": "x", "id": 1}])
    (asked,) = read([listed], dropped := Dropped(), prompts_only=True)
    assert asked.messages == MESSAGES[0][:1]
    assert "(it has 'text', 'id')" in dropped.notes[0]


def test_sources_that_cannot_be_read_say_why(here: Path) -> None:
    """Stops: a traceback of a library, a torn file taken for a short one, a column that nobody can guess."""
    torn = write_parquet(here / "torn.parquet", [{"messages": MESSAGES[0]}] * 50)
    torn.write_bytes(torn.read_bytes()[:-9])
    (here / "empty").mkdir()
    write_parquet(here / "texts.parquet", [{"text": "x", "id": 1}])
    write_parquet(here / "org" / "texts" / "train.parquet", [{"text": "x", "id": 1}])
    write_jsonl(here / "org" / "lines" / "train.jsonl", [{"text": "x", "id": 1}])
    for split in ("left", "right"):
        write_jsonl(here / "org" / "two" / split / f"{split}.jsonl", [{"messages": MESSAGES[0]}])
    (here / "org" / "two" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {split}/*\n" for split in ("left", "right"))
        + "---\n"
    )
    for source, message in {
        torn: r"torn\.parquet cannot be read to its end",
        here / "none.jsonl": r"none\.jsonl does not exist; name \.jsonl",
        here / "empty": r"holds no \.jsonl",
        here
        / "texts.parquet": r"has no column messages, conversations, conversation or prompt; it has text, id;",
        "hub:org/texts": r"hub:org/texts has no column .*; it has text, id;",
        "hub:org/lines": r"hub:org/lines has no column .*; it has text, id;",
        "hub:org/two": r"has the splits left, right; name one of them",
        "hub:org/two:middle": r"has the splits left, right; name one of them",
        "hub:no/such": r"hub:no/such cannot be read to its end",
        "hub:": r"write it as hub:ORG/NAME\[/CONFIG\]\[@REVISION\]\[:SPLIT\]",
    }.items():
        with pytest.raises(CoralError, match=message):
            list(records([source]))
    assert [where for where, _ in records(["hub:org/two:right"])] == ["hub:org/two:right:1"]


def test_a_stream_is_not_read_before_it_is_asked_for(here: Path) -> None:
    """Stops: a dataset of terabytes that is downloaded, or read once, before its first record is used."""
    write_jsonl(here / "org" / "big" / "train-1.jsonl", [{"messages": each} for each in MESSAGES[:2]])
    (here / "org" / "big" / "train-2.jsonl").write_text("{torn")
    stream = records(["hub:org/big"])
    assert [next(stream)[0] for _ in range(2)] == ["hub:org/big:1", "hub:org/big:2"]
    with pytest.raises(CoralError, match="cannot be read to its end"):
        next(stream)


def test_prepare_and_regenerate_read_streams(coral: Any, models: Path, here: Path) -> None:
    """Stops: a command that takes a source for a path, and a limit without a meaning for a stream."""
    write_parquet(here / "org" / "chats" / "train.parquet", [{"messages": each} for each in MESSAGES[:40]])
    common = ("--tokenizer", models / "target", "--held-out", 3, "--limit", 12)
    result = coral("data", "prepare", "hub:org/chats", *common, "--output", "a")
    assert result.code == 0 and result.out.startswith("12 examples in 12 rows"), result.err
    info = load("a").info
    assert info["source"] == ["hub:org/chats"] and info["held_out"] == info["kept_from_training"] == 3
    command = ("data", "regenerate", "hub:org/chats", "--output", "o.jsonl", "--target", models / "target")
    command += ("--max-new-tokens", 2, "--limit", 9)
    result = coral(*command)
    assert result.code == 0 and "40 records = " in result.out and " + 31 skipped + " in result.out, result.out
    written = (here / "o.jsonl").read_bytes()
    assert 0 < written.count(b"\n") <= 9  # a random target may say nothing
    assert coral(*command).code == 0 and (here / "o.jsonl").read_bytes() == written


openings = st.lists(st.integers(0, 12), min_size=1, max_size=60)


@given(openings, st.integers(0, 15), st.integers(0, 3))
def test_prompts_are_set_aside_in_one_pass_as_in_two(opened: list[int], count: int, seed: int) -> None:
    """Stops: a conversation that is trained on although its prompt is held out, or that is lost between."""
    conversations = [
        Conversation(str(i), [{"role": "user", "content": str(k)}, {"role": "assistant", "content": str(i)}])
        for i, k in enumerate(opened)
    ]
    aside: dict[bytes, list[Conversation]] = {}
    rest = list(set_aside(iter(conversations), count, seed, aside))
    digests = {k: _digest([{"role": "user", "content": str(k)}], seed) for k in opened}
    chosen = sorted(digests.values())[:count]
    assert sorted(aside) == chosen
    kept = [conversation for group in aside.values() for conversation in group]
    assert {c.where for c in kept} == {str(i) for i, k in enumerate(opened) if digests[k] in chosen}
    assert Counter(c.where for c in [*rest, *kept]) == Counter(c.where for c in conversations)


def test_a_limit_draws_evenly_whatever_the_order() -> None:
    """Stops: the head of the first source instead of a sample, and one that changes when a cluster writes the
    same records in another order.
    """
    conversations = [Conversation(str(i), messages) for i, messages in enumerate(MESSAGES)]
    drawn = [{c.where for c in draw(conversations, 50, seed)} for seed in range(40)]
    assert all(len(each) == 50 for each in drawn)
    assert {c.where for c in draw(conversations[::-1], 50, 0)} == drawn[0] != drawn[1]
    counts = Counter(where for each in drawn for where in each)
    thirds = [sum(counts[str(i)] for i in range(k, k + 50)) for k in (0, 50, 100)]
    assert all(abs(third - 2000 / 3) < 100 for third in thirds)  # 5 standard deviations are about 105


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """Stops: conversations, or something of each, that is kept until all have been read."""

    def peak(count: int) -> int:
        said = [[{**m, "content": f"{i} {'x' * 200}"} for m in MESSAGES[0]] for i in range(count)]
        rows = [{"messages": messages} for messages in said]
        source = write_parquet(tmp_path / f"{count}.parquet", rows)
        del said, rows
        tracemalloc.start()
        prepare([source], tiny_tokenizer(), tmp_path / f"out-{count}", PrepareConfig(held_out=5))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # what is imported and built once
    assert peak(1000) < 1.2 * peak(250)
