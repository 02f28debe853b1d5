"""The prepared data directory: conversations as token ids and loss masks on disk, ready for training.

DIR/                an Arrow dataset (`datasets.load_from_disk`) with one row per example, or per packed row:
                    input_ids list[int32]; loss_mask list[bool], not shifted; document_starts list[int32]
DIR/coral.json      which tokenizer made it, counts, and what was dropped for which reason
DIR/held_out.json   prompts (token ids) set aside: never trained on, used to measure acceptance
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from coral import json_file
from coral.errors import CoralError
from coral.json_file import OPEN, Count, Id, Size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from coral.data.features import Rows

FORMAT_VERSION = 1
_COLUMNS = ("input_ids", "loss_mask", "document_starts")


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
