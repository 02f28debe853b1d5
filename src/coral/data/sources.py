"""Where conversations come from: records one at a time, so that a source may be larger than memory.

FILE.jsonl, FILE.jsonl.gz               one JSON object a line (as any file that is not Parquet)
FILE.parquet                            one record a row
DIRECTORY                               all such files below it, in the order of their paths
hub:NAME[/CONFIG][@REVISION][:SPLIT]    a dataset of the Hugging Face hub, streamed; NAME is ORG/NAME
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import httpx2

from coral.errors import CoralError

Source: TypeAlias = str | Path
Record: TypeAlias = bytes | dict[str, Any]
"""A line of JSON, or the columns of a row."""

COLUMNS = ("messages", "conversations", "prompt")
_KINDS = (".jsonl", ".jsonl.gz", ".parquet")
_HUB = re.compile(r"hub:([^/@:]+(?:/[^/@:]+)?)(?:/([^/@:]+))?(?:@([^:]+))?(?::([\w.-]+))?")
_ROWS = 64  # of a Parquet file that are read together


def records(sources: Sequence[Source]) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) of all sources in order; of a row's columns, those that we read.

    `where` is "FILE:NUMBER", from 1; empty lines are counted and left out.

    Raises:
        CoralError: a source is missing, cannot be read to its end, or has none of the `COLUMNS`.
    """
    for part in _parts(sources):
        with _readable(part):
            for number, record in enumerate(_read(part), start=1):
                if isinstance(record, dict) or record.strip():
                    yield f"{part}:{number}", record


def size(sources: Sequence[Source]) -> int | None:
    """How many records there are, empty lines too; None with a dataset of the hub that does not say it.

    Raises:
        CoralError: a source is missing or cannot be read to its end.
    """
    total = 0
    for part in _parts(sources):
        with _readable(part):
            count = _hub_size(part) if isinstance(part, str) else _file_size(part)
        if count is None:
            return None
        total += count
    return total


@contextmanager
def _readable(part: Source) -> Iterator[None]:
    """Whatever the disk, the hub or the format raises in this block becomes one sentence."""
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError, httpx2.HTTPError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise CoralError(f"{part} cannot be read to its end ({reason}); check or fetch it again.") from error


def _parts(sources: Sequence[Source]) -> Iterator[Source]:
    """Datasets of the hub as they are, and files: those of a directory one by one."""
    for source in map(str, sources):
        yield from [source] if source.startswith("hub:") else _files(Path(source))


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CoralError(
            f"{source} does not exist; name .jsonl, .jsonl.gz or .parquet files of conversations, a "
            "directory of them, or hub:ORG/NAME."
        )
    if found := sorted(path for path in source.rglob("*") if path.name.endswith(_KINDS)):
        return found
    raise CoralError(f"{source} holds no {', '.join(_KINDS)} file; name another directory, or the files.")


def _read(part: Source) -> Iterator[Record]:
    if isinstance(part, str):
        return _hub_rows(part)
    return _parquet_rows(part) if _is_parquet(part) else _lines(part)


def _lines(path: Path) -> Iterator[Record]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        yield from lines


def _parquet_rows(path: Path) -> Iterator[Record]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=_known(path, file.schema_arrow.names)):
            yield from batch.to_pylist()


def _file_size(path: Path) -> int:
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows if _is_parquet(path) else sum(1 for _ in _lines(path))


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _hub_rows(source: str) -> Iterator[Record]:
    dataset = _hub_dataset(source)
    if dataset.column_names is None:  # not known before a row is read
        columns = list(next(iter(dataset), None) or COLUMNS)
    else:
        columns = dataset.column_names
    yield from dataset.select_columns(_known(source, columns))


def _hub_size(source: str) -> int | None:
    dataset = _hub_dataset(source)
    split = (dataset.info.splits or {}).get(str(dataset.split))
    return split.num_examples or None if split else None


def _hub_dataset(source: str) -> Any:
    """The `datasets.IterableDataset` that a hub source names; nothing is downloaded but its description."""
    from datasets import load_dataset

    if not (parts := _HUB.fullmatch(source)):
        raise CoralError(f"cannot read {source!r}; write it as hub:ORG/NAME[/CONFIG][@REVISION][:SPLIT].")
    name, config, revision, split = parts.groups()
    splits = load_dataset(name, config, revision=revision, streaming=True)
    split = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else "")
    if split not in splits:
        raise CoralError(f"{source} has the splits {', '.join(splits)}; name one of them (hub:...:SPLIT).")
    return splits[split]


def _known(source: Source, columns: Sequence[str]) -> list[str]:
    if known := [name for name in COLUMNS if name in columns]:
        return known
    raise CoralError(
        f"{source} has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; it has {', '.join(columns)}; "
        "rename the one that holds the conversations."
    )
