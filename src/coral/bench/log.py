"""What a bench has finished: one JSON object a line, appended and flushed as it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coral.bench.costs import Costs
from coral.bench.rows import Record
from coral.errors import CoralError


def read(directory: Path) -> tuple[dict[str, Any], list[Record]]:
    """Header and records of a bench, finished or not; the header has the drafters' trees too, as `Log.trees`.

    Raises:
        CoralError: there is no bench in this directory, or it cannot be read.
    """
    path = directory / "records.jsonl"
    if not path.is_file():
        raise CoralError(f"{directory} holds no bench (no records.jsonl); name an --output of `coral bench`.")
    try:
        header, *items = [json.loads(line) for line in _finished(path)]
        header["settings"]  # what a comparison asks for
        header["trees"] = dict(pair for item in items if "trees" in item for pair in item["trees"].items())
        return header, [Record.from_json(item["record"]) for item in items if "record" in item]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CoralError(f"cannot read {path} ({reason}); was it written by `coral bench`?") from error


def _finished(path: Path) -> list[bytes]:
    """Whole lines: what follows the last line end was torn when the bench was killed."""
    return path.read_bytes().split(b"\n")[:-1]


class Log:
    """Records, costs and trees on disk. The first line, the header, says which bench they belong to.

    trees: by dtype and drafter, its budget and where that came from (see `api.choose_budget`).

    Raises:
        CoralError: the file holds another bench, or cannot be read or written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.records: list[Record] = []
        self.costs: dict[str, Costs] = {}
        self.trees: dict[str, dict[str, Any]] = {}
        self._index: dict[tuple[object, ...], Record] = {}
        self._header: dict[str, Any] | None = None  # until it is written, with the first record
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            finished = _finished(path) if path.exists() else []
            if not finished:
                self._header = header  # a bench that fails before its first record leaves no file in the way
                return
            if json.loads(finished[0]) != json.loads(json.dumps(header)):
                raise CoralError(
                    f"{path} holds a bench with other settings or of another commit; "
                    f"choose another --output or remove it."
                )
            with path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in finished))
            for line in finished[1:]:
                self._take(json.loads(line))
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CoralError(
                f"cannot use {path} ({reason}); choose another --output or remove it."
            ) from error

    def find(self, key: tuple[object, ...]) -> Record | None:
        """The record of this key, if it was finished earlier."""
        return self._index.get(key)

    def add(self, item: Record | Costs) -> None:
        """Append to the file, then remember."""
        self._add({"costs": item.to_json()} if isinstance(item, Costs) else {"record": item.to_json()})

    def add_trees(self, dtype: str, trees: dict[str, Any]) -> None:
        """Append the trees of the drafters in this dtype, then remember."""
        self._add({"trees": {dtype: trees}})

    def _add(self, data: dict[str, Any]) -> None:
        try:
            self._append(data)
        except OSError as error:
            raise CoralError(f"cannot write {self.path}: {error.strerror}; free some space.") from error
        self._take(data)

    def _take(self, data: dict[str, Any]) -> None:
        if "costs" in data:
            costs = Costs.from_json(data["costs"])
            self.costs[costs.dtype] = costs
        elif "trees" in data:
            self.trees |= data["trees"]
        else:
            record = Record.from_json(data["record"])
            self.records.append(record)
            self._index[record.key] = record

    def _append(self, data: dict[str, Any]) -> None:
        with self.path.open("a" if self._header is None else "w", encoding="utf-8") as file:
            if self._header is not None:
                file.write(json.dumps(self._header) + "\n")
            file.write(json.dumps(data) + "\n")
        self._header = None
