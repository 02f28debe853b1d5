"""Prepare conversations for training: token ids and loss masks, in the directory that `prepared` reads."""

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

from coral.data.chat_format import ChatFormat, Example
from coral.data.conversations import BadRecordError, Conversation, Dropped, Message, read
from coral.data.prepared import FORMAT_VERSION, vocabulary_digest
from coral.data.rows_digest import RowsDigest
from coral.data.sources import Source, listed, size
from coral.errors import CoralError
from coral.files import atomic_directory
from coral.progress import bar, counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OURS = ("coral.json", "held_out.json", "dataset_info.json", "state.json", "*.arrow")
OPEN_ROWS = 64  # packed rows that are filled side by side


@dataclass(frozen=True)
class Row:
    """One row to train on; a document starts at each offset of `document_starts`."""

    input_ids: list[int]
    loss_mask: list[bool]
    document_starts: list[int]


@dataclass(frozen=True)
class PrepareConfig:
    """How conversations are prepared.

    max_length: rows are cut (or packed) at this many tokens.
    pack: put whole conversations together into rows.
    held_out: different opening prompts to draw with `seed`; every conversation that opens with one of them
        is kept from training.
    limit: train on this many of the others, drawn with `seed` from all of them, which stand in memory
        together.
    last_turn_only: train on last answers only, for templates that rewrite history.
    """

    max_length: int = 2048
    pack: bool = False
    held_out: int = 60
    seed: int = 0
    limit: int | None = None
    last_turn_only: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 2 or self.held_out < 0 or (self.limit is not None and self.limit < 1):
            raise CoralError("max_length must be at least 2, held_out at least 0 and limit at least 1.")


def prepare(
    sources: Source | Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    output: str | Path,
    config: PrepareConfig | None = None,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the prepared directory `output` and return its info; progress goes to `console` (None: silent).

    The sources are read once, one conversation at a time. What is drawn depends on the conversations, not on
    their order.

    Raises:
        CoralError: no usable conversation, fewer opening prompts than `held_out` asks for, an unreadable
            source, a template that rewrites history, or an output that holds something else.
    """
    output, config = Path(output), config or PrepareConfig()
    _refuse_foreign(output)
    chat, dropped = ChatFormat(tokenizer), Dropped()
    aside: dict[bytes, list[Conversation]] = {}
    with atomic_directory(output, _OURS) as directory:
        chosen, total = _chosen(sources, config, aside, dropped, console)
        with bar(console, "preparing", total) as advance:
            each = counted(chosen, advance, dropped if config.limit is None else None)
            rows = _rows(_examples(each, chat, config, dropped), config)
            counts, digest = _write_rows(rows, directory)
        if not counts["examples"]:
            raise CoralError(f"no conversation in {_names(sources)} can be trained on{because(dropped)}")
        prompts = _prompts(aside, chat, dropped)
        info = {
            "format_version": FORMAT_VERSION,
            "tokenizer": tokenizer.name_or_path,
            "vocab_size": len(tokenizer),
            "vocabulary": vocabulary_digest(tokenizer),
            "max_length": config.max_length,
            "packed": config.pack,
            "last_turn_only": config.last_turn_only,
            "seed": config.seed,
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


def _chosen(
    sources: Source | Sequence[Source],
    config: PrepareConfig,
    aside: dict[bytes, list[Conversation]],
    dropped: Dropped,
    console: Console | None,
) -> tuple[Iterator[Conversation], int | None]:
    """The conversations to train on, and how many records that is, where it is known."""
    total = size(sources)
    chosen = set_aside(read(sources, dropped), config.held_out, config.seed, aside)
    if (first := next(chosen, None)) is None:
        if not aside:
            raise CoralError(f"no usable conversation in {_names(sources)}{because(dropped)}")
        raise CoralError(
            f"{config.held_out} prompts are to be held out, but the conversations open with only "
            f"{len(aside)} different ones; lower held_out (--held-out) or add data."
        )
    chosen = chain([first], chosen)
    if config.limit is None:
        return chosen, total
    with bar(console, "drawing", total) as advance:
        drawn = draw(counted(chosen, advance, dropped), config.limit, config.seed)
    return iter(drawn), len(drawn)


def _examples(
    conversations: Iterable[Conversation], chat: ChatFormat, config: PrepareConfig, dropped: Dropped
) -> Iterator[Example]:
    """The conversations as token ids, without those that cannot be trained on."""
    for conversation in conversations:
        changes: list[str] = []
        try:
            example = chat.encode(conversation, last_turn_only=config.last_turn_only, changes=changes)
            yield _truncate(example, config.max_length)
            dropped.changed.update(dict.fromkeys(changes, 1))
        except BadRecordError as error:
            dropped.add(conversation.where, str(error), error.detail)


def _rows(examples: Iterator[Example], config: PrepareConfig) -> Iterator[Row]:
    if config.pack:
        return packed(examples, config.max_length)
    return (Row(example.input_ids, example.loss_mask, [0]) for example in examples)


def set_aside(
    conversations: Iterable[Conversation], count: int, seed: int, aside: dict[bytes, list[Conversation]]
) -> Iterator[Conversation]:
    """Yield all conversations but those that open with one of `count` prompts, which end up in `aside`.

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
    """Draw `count` conversations, or all if there are fewer, uniformly in one pass."""
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
    """The end of a sentence about sources without a usable record: the reasons."""
    if not dropped.total:
        return "; name .jsonl, .json or .parquet files of conversations."
    return f": {dropped}."
