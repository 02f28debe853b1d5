"""A file's records are the same whatever its form; what is wrong with one of them is told of that one."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coral.data import json_records as module
from coral.data.json_records import json_records
from coral.data.sources import records, size
from coral.errors import CoralError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
value = st.recursive(
    text | st.integers() | st.none() | st.sampled_from(['"', "\\", '\\"', "[", "}", ",", "[{", "\\u005d"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
rows = st.lists(st.dictionaries(text, value, min_size=1, max_size=3), min_size=1, max_size=6)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows, st.sampled_from(sorted(PACK)), st.sampled_from(ENCODINGS), st.booleans(),
    st.sampled_from([0, 1, None]), st.sampled_from([1, 3, 1 << 20]),
)  # fmt: skip
def test_lines_arrays_and_objects_hold_the_same_records(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: list[dict[str, Any]],
    packing: str,
    encoding: str,
    ascii_only: bool,
    indent: int | None,
    piece: int,
) -> None:
    """Stops: a bracket or a quote in a text that is taken for the end of a record, a record that is torn
    where two pieces of the file meet, an encoding that is taken for another.
    """
    monkeypatch.setattr(module, "_PIECE", piece)
    dump = lambda each, **how: json.dumps(each, ensure_ascii=ascii_only, **how)  # noqa: E731
    forms = {
        "x.jsonl": "\n".join(map(dump, made)),
        "x.json": dump(made, indent=indent),
        "array": f" \n {dump(made)}\n",
        "objects.json": "\n".join(dump(each, indent=1) for each in made),
    }
    for name, content in forms.items():
        path = tmp_path / name
        path.write_bytes(PACK[packing](content.encode(encoding)))
        found = [json.loads(record) for _, record in records([path]) if isinstance(record, bytes)]
        assert found == made, name
        assert size([path]) == len(made), name


def test_a_bad_element_is_a_bad_record_and_not_a_bad_file(tmp_path: Path) -> None:
    """Stops: a dump of a million conversations that cannot be read for one that is no JSON, too deep, or no
    object; and elements that vanish without a count.
    """
    deep = "[" * 100_000 + "]" * 100_000
    path = tmp_path / "x.json"
    path.write_text(f'[{{"a": 1}}, {{"a" 1}}, 3, {deep}, {{"b": "]"}},\n]\n{{"c": 1}}\n')
    found = list(json_records(path))
    assert [each.strip() for each in found if each.strip()] == [
        b'{"a": 1}', b'{"a" 1}', b"3", deep.encode(), b'{"b": "]"}', b'{"c": 1}',
    ]  # fmt: skip


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a":', '[{"a": 1}', '[{"a": "x'])
def test_a_torn_array_is_no_short_file(tmp_path: Path, content: str) -> None:
    """Stops: half a download that passes for the whole."""
    (path := tmp_path / "x.json").write_text(content)
    with pytest.raises(CoralError, match="cannot be read to its end"):
        list(records([path]))


def test_what_cannot_be_unpacked_is_named(tmp_path: Path) -> None:
    """Stops: a packed file that is taken for one bad record."""
    (path := tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd....")
    with pytest.raises(CoralError, match="packed with zstd"):
        list(records([path]))


def test_a_directory_gives_its_sources_and_nothing_else(tmp_path: Path) -> None:
    """Stops: `.json` files that are left out; an account of ours, or a hub cache's notes, read as records."""
    for name in ("a.json", "b.jsonl.gz", "c/d.json.gz", "x.account.json", "x.failed.jsonl", ".cache/e.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"a": 1}\n')
    found = [where.removeprefix(f"{tmp_path}/") for where, _ in records(tmp_path)]
    assert found == ["a.json:1", "b.jsonl.gz:1", "c/d.json.gz:1"]


def test_one_source_alone_is_no_sequence_of_letters(tmp_path: Path) -> None:
    """Stops: `records("x.jsonl")`, which looks for a file named "x"."""
    (path := tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [where for where, _ in records(str(path))] == [f"{path}:1", f"{path}:3"]
    assert size(path) == 2
