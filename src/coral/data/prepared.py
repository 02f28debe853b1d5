"""The prepared data directory: conversations as token ids and loss masks on disk, ready for training.

DIR/                an Arrow dataset (`datasets.load_from_disk`) with one row per example, or per packed row:
                    input_ids list[int32]; loss_mask list[bool], not shifted; document_starts list[int32]
DIR/coral.json      which tokenizer made it, counts, and what was dropped for which reason
DIR/held_out.json   prompts (token ids) set aside: never trained on, used to measure acceptance
"""

import hashlib
import heapq
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from typing_extensions import TypedDict

from coral import json_file
from coral.data.chat_format import ChatFormat, Example
from coral.data.conversations import BadRecordError, Conversation, Dropped, Message, read
from coral.data.rows_digest import RowsDigest
from coral.data.sources import Source, listed, size
from coral.errors import CoralError
from coral.files import atomic_directory
from coral.json_file import OPEN, Count, Id, Size
from coral.progress import bar, counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from coral.data.features import Rows

FORMAT_VERSION = 1
_COLUMNS = ("input_ids", "loss_mask", "document_starts")
_OURS = ("coral.json", "held_out.json", "dataset_info.json", "state.json", "*.arrow")
OPEN_ROWS = 64  # packed rows that are filled side by side


class Info(TypedDict):
    """What coral.json holds, as far as anything asks for it."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    format_version: Size
    tokenizer: str
    vocab_size: Size
    vocabulary: str
    max_length: Size
    examples: Size
    rows: Size
    tokens: Count
    trained_tokens: Count
    held_out: Count
    kept_from_training: Count
    dropped: dict[str, Count]
    dropped_notes: list[str]


@dataclass(frozen=True)
class PreparedData:
    """A prepared directory in memory: see the module's docstring."""

    dataset: "Rows"
    held_out_prompts: list[list[int]]
    info: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row to train on; a document starts at each offset of `document_starts`."""

    input_ids: list[int]
    loss_mask: list[bool]
    document_starts: list[int]


def prepare(
    sources: Source | Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    output: str | Path,
    *,
    max_length: int = 2048,
    pack: bool = False,
    held_out: int = 60,
    seed: int = 0,
    limit: int | None = None,
    last_turn_only: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the prepared directory `output` and return its info; progress goes to `console` (None: silent).

    The sources are read once, one conversation at a time. `held_out` different opening prompts are drawn with
    `seed`; every conversation that opens with one of them is kept from training. `limit` trains on that many
    of the others, drawn with `seed` from all of them, which stand in memory together. What is drawn depends
    on the conversations, not on their order.

    Raises:
        CoralError: no usable conversation, fewer opening prompts than `held_out` asks for, an unreadable
            source, a template that rewrites history, or an output that holds something else.
    """
    output = Path(output)
    _refuse_foreign(output)
    if max_length < 2 or held_out < 0 or (limit is not None and limit < 1):
        raise CoralError("max_length must be at least 2, held_out at least 0 and limit at least 1.")
    chat = ChatFormat(tokenizer)
    dropped = Dropped()
    aside: dict[bytes, list[Conversation]] = {}
    total = size(sources)

    def examples(conversations: Iterable[Conversation]) -> Iterator[Example]:
        for conversation in conversations:
            changes: list[str] = []
            try:
                example = chat.encode(conversation, last_turn_only=last_turn_only, changes=changes)
                yield _truncate(example, max_length)
                dropped.changed.update(dict.fromkeys(changes, 1))
            except BadRecordError as error:
                dropped.add(conversation.where, str(error), error.detail)

    with atomic_directory(output, _OURS) as directory:
        chosen = set_aside(read(sources, dropped), held_out, seed, aside)
        if (first := next(chosen, None)) is None:
            if not aside:
                raise CoralError(f"no usable conversation in {_names(sources)}{because(dropped)}")
            raise CoralError(
                f"{held_out} prompts are to be held out, but the conversations open with only {len(aside)} "
                "different ones; lower held_out (--held-out) or add data."
            )
        chosen = chain([first], chosen)
        if limit is not None:
            with bar(console, "drawing", total) as advance:
                drawn = draw(counted(chosen, advance, dropped), limit, seed)
            chosen, total = iter(drawn), len(drawn)
        with bar(console, "preparing", total) as advance:
            encoded = examples(counted(chosen, advance, dropped if limit is None else None))
            rows = (
                packed(encoded, max_length) if pack else (Row(e.input_ids, e.loss_mask, [0]) for e in encoded)
            )
            counts, digest = _write_rows(rows, directory)
        if not counts["examples"]:
            raise CoralError(f"no conversation in {_names(sources)} can be trained on{because(dropped)}")
        prompts = _prompts(aside, chat, dropped)
        info = {
            "format_version": FORMAT_VERSION,
            "tokenizer": tokenizer.name_or_path,
            "vocab_size": len(tokenizer),
            "vocabulary": vocabulary_digest(tokenizer),
            "max_length": max_length,
            "packed": pack,
            "last_turn_only": last_turn_only,
            "seed": seed,
            **counts,
            "digest": digest,
            "held_out": len(prompts),
            "kept_from_training": sum(map(len, aside.values())),
            "dropped": dict(dropped.counts.most_common()),
            "dropped_notes": dropped.notes,
            "changed": dict(dropped.changed.most_common()),
            "source": listed(sources),
        }
        (directory / "held_out.json").write_text(json.dumps(prompts), encoding="utf-8")
        (directory / "coral.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return info


def set_aside(
    conversations: Iterable[Conversation], count: int, seed: int, aside: dict[bytes, list[Conversation]]
) -> Iterator[Conversation]:
    """Yield the conversations but for those that open with one of `count` prompts, which end up in `aside`.

    The prompts are those with the smallest keyed digests, so one pass is enough: what waits in `aside` is
    handed on as soon as its prompt is no longer among them.
    """
    for conversation in conversations:
        key = _digest(conversation.messages[: conversation.answers[0]], seed)
        if key in aside:
            aside[key].append(conversation)
        elif len(aside) < count:
            aside[key] = [conversation]
        elif count and key < (largest := max(aside)):
            aside[key] = [conversation]
            yield from aside.pop(largest)
        else:
            yield conversation


def draw(conversations: Iterable[Conversation], count: int, seed: int) -> list[Conversation]:
    """`count` of the conversations, or all if there are fewer, drawn evenly in one pass."""
    return heapq.nsmallest(count, conversations, key=lambda each: _digest(each.messages, seed))


def _digest(messages: Sequence[Message], seed: int) -> bytes:
    return hashlib.blake2b(f"{seed} {json.dumps(messages)}".encode(), digest_size=12).digest()


def _prompts(aside: dict[bytes, list[Conversation]], chat: ChatFormat, dropped: Dropped) -> list[list[int]]:
    """Token ids of the prompts set aside."""
    prompts = []
    for _, (first, *_) in sorted(aside.items()):
        try:
            prompts.append(chat.prompt(first.messages[: first.answers[0]]))
        except BadRecordError as error:
            dropped.add(first.where, str(error))
    return prompts


def report(info: dict[str, Any]) -> str:
    """The summary of a prepared directory as a person reads it, dropped records with their file and line."""
    share = info["trained_tokens"] / max(info["tokens"], 1)
    lines = [
        f"{info['examples']:,} examples in {info['rows']:,} rows, {info['tokens']:,} tokens, "
        f"{info['trained_tokens']:,} of them trained on ({share:.0%})",
        f"{info['held_out']:,} prompts held out (with {info['kept_from_training']:,} conversations)",
        f"{sum(info['dropped'].values()):,} records dropped",
        *(f"  {count:,} x {reason}" for reason, count in info["dropped"].items()),
    ]
    if changed := info.get("changed"):
        lines.append("of the records that are used, some only in part or in another form")
        lines += [f"  {count:,} x {what}" for what, count in changed.items()]
    if info["dropped_notes"]:
        lines += ["the first of each kind:", *(f"  {note}" for note in info["dropped_notes"])]
    return "\n".join(lines)


def load(source: str | Path) -> PreparedData:
    """Open a prepared directory (the rows stay memory-mapped on disk).

    Raises:
        CoralError: it does not exist, is no prepared directory, or was written by a newer version.
    """
    from datasets import load_from_disk

    directory = Path(source)
    if not directory.is_dir():
        raise CoralError(f"{directory} does not exist; make it with `coral data prepare`.")
    if not (directory / "coral.json").is_file():
        raise CoralError(
            f"{directory} is no prepared data directory (no coral.json); run `coral data prepare`."
        )
    again = "run `coral data prepare` again."
    version = json_file.read(directory / "coral.json", dict, again).get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CoralError(f"{directory} was prepared by a newer coral; update coral or prepare it again.")
    info: Any = json_file.read(directory / "coral.json", Info, again)
    prompts = json_file.read(directory / "held_out.json", list[list[Id]], again)
    check_prompts(directory / "held_out.json", prompts, info, again)
    try:
        dataset = load_from_disk(str(directory))
    except Exception as error:  # datasets and Arrow raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CoralError(f"{directory} is damaged ({reason}); {again}") from error
    if len(dataset) != info["rows"] or not {*_COLUMNS} <= {*getattr(dataset, "column_names", ())}:
        raise CoralError(
            f"{directory} is damaged (its rows are not the {info['rows']} of coral.json); {again}"
        )
    return PreparedData(dataset, prompts, info)


def check_prompts(where: Path, prompts: list[list[int]], info: dict[str, Any], advice: str) -> None:
    """Raise CoralError for held-out prompts that are empty or hold ids beyond the vocabulary of `info`."""
    most = max((max(prompt, default=0) for prompt in prompts), default=0)
    if not all(prompts) or most >= info["vocab_size"]:
        raise CoralError(f"{where} cannot be read (a prompt is empty, or its ids are no tokens); {advice}")


def check(info: dict[str, Any], vocab_size: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
    """Refuse data made for another target: ids beyond its `vocab_size`, or, if given, another tokenizer.

    Raises:
        CoralError: names both vocabularies and says to prepare the data again.
    """
    again = "prepare the data with the target's own tokenizer."
    if info["vocab_size"] > vocab_size:
        raise CoralError(
            f"the data was prepared with {info['tokenizer']} ({info['vocab_size']} tokens), but the target "
            f"has a vocabulary of {vocab_size}; {again}"
        )
    if tokenizer is not None and info["vocabulary"] != vocabulary_digest(tokenizer):
        raise CoralError(
            f"the data was prepared with the vocabulary of {info['tokenizer']}, which is not that of "
            f"{tokenizer.name_or_path or 'the target'}; {again}"
        )


def vocabulary_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A short fingerprint of the map from token to id."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def packed(examples: Iterator[Example], max_length: int) -> Iterator[Row]:
    """Put whole examples into rows of at most `max_length` tokens, each into the fullest open row it fits."""
    rows: list[Row] = []
    for example in examples:
        fitting = [r for r in rows if len(r.input_ids) + len(example.input_ids) <= max_length]
        if fitting:
            row = max(fitting, key=lambda r: len(r.input_ids))
        else:
            if len(rows) == OPEN_ROWS:
                fullest = max(range(OPEN_ROWS), key=lambda i: len(rows[i].input_ids))
                yield rows.pop(fullest)
            rows.append(row := Row([], [], []))
        row.document_starts.append(len(row.input_ids))
        row.input_ids.extend(example.input_ids)
        row.loss_mask.extend(example.loss_mask)
    yield from rows


def _truncate(example: Example, max_length: int) -> Example:
    # A row's first trained token needs one before it, which every template's prompt gives.
    mask = example.loss_mask[:max_length]
    if not any(mask):
        raise BadRecordError(f"no token to train on within {max_length} tokens (--max-length)")
    return Example(example.input_ids[:max_length], mask)


def _write_rows(rows: Iterator[Row], directory: Path) -> tuple[dict[str, int], str]:
    """Stream rows into an Arrow dataset in `directory`, none kept in memory; returns counts and digest."""
    from datasets import Dataset, Features, Sequence, Value, disable_progress_bars, enable_progress_bars
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        input_ids=Sequence(Value("int32")),
        loss_mask=Sequence(Value("bool")),
        document_starts=Sequence(Value("int32")),
    )
    counts, digest = dict.fromkeys(("examples", "rows", "tokens", "trained_tokens"), 0), RowsDigest()
    stream = directory / "stream" / "rows.arrow"  # copied by save_to_disk, which adds its description
    stream.parent.mkdir()
    writer = ArrowWriter(path=str(stream), features=features, writer_batch_size=100)
    for row in rows:
        writer.write(vars(row))
        digest.add(vars(row))
        counts["examples"] += len(row.document_starts)
        counts["rows"] += 1
        counts["tokens"] += len(row.input_ids)
        counts["trained_tokens"] += sum(row.loss_mask)
    writer.finalize()
    if counts["rows"]:
        disable_progress_bars()
        try:
            Dataset.from_file(str(stream)).save_to_disk(str(directory))
        finally:
            enable_progress_bars()
    shutil.rmtree(stream.parent)
    return counts, str(digest)


def _refuse_foreign(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()) and not (output / "coral.json").is_file():
        raise CoralError(f"{output} holds other files and will not be replaced; choose another output.")


def _names(sources: Source | Sequence[Source]) -> str:
    return ", ".join(listed(sources)) or "an empty list of sources"


def because(dropped: Dropped) -> str:
    """The end of a sentence about sources that hold nothing to use: why not."""
    if not dropped.total:
        return "; name .jsonl, .json or .parquet files of conversations."
    return f": {dropped}."
