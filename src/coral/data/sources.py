"""Where conversations come from: records one at a time, so that a source may be larger than memory.

FILE.jsonl, FILE.json, packed or not    one JSON object a line, or an array of them (see `json_records`); as
                                        any file that is not Parquet
FILE.parquet                            one record a row
DIRECTORY                               all such files below it, in the order of their paths
hub:NAME[/CONFIG][@REVISION][:SPLIT]    a dataset of the Hugging Face hub, streamed; NAME is ORG/NAME
"""

import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import httpx2

from coral.data.json_records import json_records
from coral.errors import CoralError

Source: TypeAlias = str | Path
Record: TypeAlias = bytes | dict[str, Any]
"""The bytes of a JSON value, or the columns of a row."""

COLUMNS = ("messages", "conversations", "conversation", "prompt")
"""What may hold the conversation: the first that does is read."""
ANSWERS = ("completion", "response")
"""What may hold the answer to a `prompt`."""
SYSTEM = ("system", "system_prompt")
"""What may hold a system message beside the conversation."""
_PACKED = ("", ".gz", ".bz2", ".xz")
_KINDS = (*(f"{kind}{packed}" for kind in (".jsonl", ".json") for packed in _PACKED), ".parquet")
_OURS = (".account.json", ".failed.jsonl")  # what stands beside regenerated conversations
_HUB = re.compile(r"hub:([^/@:]+(?:/[^/@:]+)?)(?:/([^/@:]+))?(?:@([^:]+))?(?::([\w.-]+))?")
_ROWS = 64  # of a Parquet file that are read together


def records(sources: Source | Sequence[Source]) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) of all sources in order; of a row's columns, those that we read.

    `where` is "FILE:NUMBER", from 1; empty lines are counted and left out. One source may stand for itself.

    Raises:
        CoralError: a source is missing, cannot be read to its end, or has none of the `COLUMNS`.
    """
    for part in _parts(sources):
        with _readable(part):
            for number, record in enumerate(_read(part), start=1):
                if _is_record(record):
                    yield f"{part}:{number}", record


def size(sources: Source | Sequence[Source]) -> int | None:
    """Number of records; None for a dataset of the hub that does not state it.

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
    """Turn what the disk, the hub or the format raises in this block into a CoralError of one sentence."""
    try:
        yield
    except CoralError:
        raise
    except (
        OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, RuntimeError, httpx2.HTTPError
    ) as error:  # fmt: skip
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise CoralError(f"{part} cannot be read to its end ({reason}); check or fetch it again.") from error


def _parts(sources: Source | Sequence[Source]) -> Iterator[Source]:
    """Yield datasets of the hub and files; a directory yields its files."""
    for source in listed(sources):
        yield from [source] if source.startswith("hub:") else _files(Path(source))


def listed(sources: Source | Sequence[Source]) -> list[str]:
    """The sources as a list of texts; a single one becomes a list of one."""
    return [str(sources)] if isinstance(sources, str | Path) else [*map(str, sources)]


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CoralError(
            f"{source} {'is no file' if source.exists() else 'does not exist'}; name .jsonl, .json or "
            ".parquet files of conversations, a directory of them, or hub:ORG/NAME."
        )
    if found := sorted(path for path in source.rglob("*") if _is_source(path.relative_to(source))):
        return found
    raise CoralError(
        f"{source} holds no .jsonl, .json or .parquet file; name another directory, or the files."
    )


def _is_source(path: Path) -> bool:
    """Whether a path in a directory is a source. Hidden files, such as those of a cache, are none."""
    hidden = any(part.startswith(".") for part in path.parts)
    return path.name.endswith(_KINDS) and not path.name.endswith(_OURS) and not hidden


def _is_record(record: Record) -> bool:
    return isinstance(record, dict) or bool(record.strip())


def _read(part: Source) -> Iterator[Record]:
    if isinstance(part, str):
        return _hub_rows(part)
    return _parquet_rows(part) if _is_parquet(part) else json_records(part)


def _parquet_rows(path: Path) -> Iterator[Record]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=_known(path, file.schema_arrow.names)):
            yield from batch.to_pylist()


def _file_size(path: Path) -> int:
    from pyarrow import parquet

    if _is_parquet(path):
        return int(parquet.read_metadata(path).num_rows)
    return sum(map(_is_record, json_records(path)))


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".parquet" or file.read(4) == b"PAR1"


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
    if any(name in columns for name in COLUMNS):
        return [name for name in (*COLUMNS, *ANSWERS, *SYSTEM) if name in columns]
    raise CoralError(
        f"{source} has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; it has {', '.join(columns)}; "
        "rename the one that holds the conversations."
    )
