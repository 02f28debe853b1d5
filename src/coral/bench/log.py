"""What a bench has finished: one JSON object a line, appended and flushed as it comes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coral import json_file
from coral.bench.costs import Costs
from coral.bench.records import Record
from coral.bench.results import Tree
from coral.errors import CoralError
from coral.json_file import STRICT


@dataclass(frozen=True)
class _Header:
    """The first line."""

    __pydantic_config__ = STRICT
    settings: dict[str, Any]
    commit: str


@dataclass(frozen=True)
class _Line:
    """Any other line, which holds one of these."""

    __pydantic_config__ = STRICT
    record: Record | None = None
    costs: Costs | None = None
    trees: dict[str, dict[str, Tree]] | None = None

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.record, self.costs, self.trees)) != 1:
            raise ValueError("a line holds one of record, costs and trees")


def read(directory: Path) -> tuple[dict[str, Any], list[Record]]:
    """Header and records of a bench, finished or not; the header has the drafters' trees too, as `Log.trees`.

    Raises:
        CoralError: there is no bench in this directory, or it cannot be read.
    """
    path = directory / "records.jsonl"
    if not path.is_file():
        raise CoralError(f"{directory} holds no bench (no records.jsonl); name an --output of `coral bench`.")
    header, lines = _read(path, "was it written by `coral bench`?")
    if header is None:
        raise CoralError(f"{path} is empty; was it written by `coral bench`?")
    trees = {dtype: found for line in lines for dtype, found in (line.trees or {}).items()}
    return {**asdict(header), "trees": trees}, [line.record for line in lines if line.record]


def _read(path: Path, advice: str) -> tuple[_Header | None, list[_Line]]:
    """The complete lines of a log; a line without an end was torn when the bench was killed."""
    try:
        whole = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise CoralError(f"{path} cannot be read ({error.strerror}); {advice}") from error
    where = [f"{path}, line {number}," for number in range(1, len(whole) + 1)]
    if not whole:
        return None, []
    header = json_file.parse(whole[0], _Header, where[0], advice)
    lines = [
        json_file.parse(line, _Line, place, advice) for line, place in zip(whole[1:], where[1:], strict=True)
    ]
    return header, lines


class Log:
    """Records, costs and trees on disk. The first line, the header, says which bench they belong to.

    trees: by dtype and drafter, its tree size and where that came from.

    Raises:
        CoralError: the file holds another bench, or cannot be read or written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.records: list[Record] = []
        self.costs: dict[str, Costs] = {}
        self.trees: dict[str, dict[str, Tree]] = {}
        self._index: dict[tuple[object, ...], Record] = {}
        self._header: dict[str, Any] | None = None  # until it is written, with the first record
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            advice = "choose another --output or remove it."
            before, lines = _read(path, advice) if path.exists() else (None, [])
            if before is None:
                self._header = header  # a bench that fails before its first record leaves no file in the way
                return
            if asdict(before) != json.loads(json.dumps(header)):
                raise CoralError(f"{path} holds a bench with other settings or of another commit; {advice}")
            with path.open("r+b") as file:
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
            for line in lines:
                self._take(line)
            names = set(header["settings"].get("drafters", ()))
            unpriced = {record.dtype for record in self.records} - self.costs.keys()
            if unpriced or any(found.keys() != names for found in self.trees.values()):
                raise CoralError(f"{path} cannot be read (it lacks costs or trees of its records); {advice}")
        except OSError as error:
            raise CoralError(f"cannot use {path} ({error.strerror}); choose another --output.") from error

    def find(self, key: tuple[object, ...]) -> Record | None:
        """The record of this key, if it was finished earlier."""
        return self._index.get(key)

    def add(self, item: Record | Costs) -> None:
        """Append to the file, then remember."""
        self._add(_Line(costs=item) if isinstance(item, Costs) else _Line(record=item))

    def add_trees(self, dtype: str, trees: dict[str, Tree]) -> None:
        """Append the trees of the drafters in this dtype, then remember."""
        self._add(_Line(trees={dtype: trees}))

    def _add(self, line: _Line) -> None:
        try:
            self._append({name: value for name, value in asdict(line).items() if value is not None})
        except OSError as error:
            raise CoralError(f"cannot write {self.path}: {error.strerror}; free some space.") from error
        self._take(line)

    def _take(self, line: _Line) -> None:
        if line.costs:
            self.costs[line.costs.dtype] = line.costs
        elif line.record:
            self.records.append(line.record)
            self._index[line.record.key] = line.record
        else:
            self.trees |= line.trees or {}

    def _append(self, data: dict[str, Any]) -> None:
        with self.path.open("a" if self._header is None else "w", encoding="utf-8") as file:
            if self._header is not None:
                file.write(json.dumps(self._header) + "\n")
            file.write(json.dumps(data) + "\n")
        self._header = None
