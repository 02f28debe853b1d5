"""Benchmark prompts: three suites ship with the package, any other is read from a JSONL file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from coral.errors import CoralError

SUITES = {"mt_bench": 80, "humaneval": 164, "gsm8k": 1319}  # name: number of prompts

# HumanEval prompts are the beginning of a function; a chat model is asked to go on, as in EAGLE's evaluation.
HUMANEVAL_INSTRUCTION = "Complete the following Python function.\n\n```python\n{prompt}```"


@dataclass(frozen=True)
class Prompt:
    """One conversation: each turn is what the user says; the answers between them are the target's own."""

    id: str
    category: str
    turns: tuple[str, ...]


def load(names: str | Iterable[str], limit: int | None = None) -> dict[str, list[Prompt]]:
    """Prompts by suite.

    Args:
        names: suites, as a list or separated by commas: mt_bench, humaneval, gsm8k, or the path of a JSONL
            file with {"id" or "question_id", "turns"} in each line (the format of Spec-Bench and EAGLE).
        limit: the first so many prompts of each suite; None takes all.

    Raises:
        CoralError: an unknown suite, or a line that cannot be read.
    """
    if limit is not None and limit < 1:
        raise CoralError(f"limit is {limit}, but at least one prompt of each suite is needed.")
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    if not any(wanted):
        raise CoralError(f"no suite was named; use some of {', '.join(SUITES)} or the path of a JSONL file.")
    suites: dict[str, list[Prompt]] = {}
    for name in filter(None, wanted):
        key = name if name in SUITES else Path(name).stem
        if key in suites or key == "all":
            raise CoralError(f"suite {key!r} is named twice or reserved; rename the file {name}.")
        suites[key] = _read(name)[:limit]
    return suites


def render(
    tokenizer: PreTrainedTokenizerBase | None, turns: Sequence[str], answers: Sequence[str]
) -> list[int]:
    """Token ids of a conversation up to where the target answers its last turn.

    Without a chat template the turns and answers follow each other, separated by blank lines.
    """
    if tokenizer is None:
        raise CoralError("the target has no tokenizer, so prompts cannot be read; load it with one.")
    texts = [text for pair in zip(turns, [*answers, ""], strict=True) for text in pair][:-1]
    if tokenizer.chat_template is None:
        return list(tokenizer("\n\n".join(texts))["input_ids"])
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def answer(tokenizer: PreTrainedTokenizerBase | None, tokens: Sequence[int], eos_ids: frozenset[int]) -> str:
    """The text up to the end token; what was written behind it was for the clock only."""
    assert tokenizer is not None
    end = next((index for index, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return str(tokenizer.decode(list(tokens[:end]), skip_special_tokens=True))


def _read(name: str) -> list[Prompt]:
    if name in SUITES:
        packed = files("coral.bench").joinpath("data", f"{name}.jsonl.gz").read_bytes()
        text = gzip.decompress(packed).decode("utf-8")
    else:
        path = Path(name)
        if not path.is_file():
            raise CoralError(
                f"suite {name!r} is neither a file nor one of {', '.join(SUITES)}; "
                f"name one of these or the path of a JSONL file."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CoralError(f"cannot read the suite {path}: {error}; it must be JSONL in UTF-8.") from error
    # split("\n"), not splitlines(): a JSON string may hold U+2028, which splitlines() takes for a line end.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    prompts = [_prompt(line, f"{name} line {number}") for number, line in lines]
    if not prompts:
        raise CoralError(f"suite {name!r} holds no prompts; check the file.")
    if name == "humaneval":
        return [Prompt(p.id, p.category, (HUMANEVAL_INSTRUCTION.format(prompt=p.turns[0]),)) for p in prompts]
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise CoralError(f"{where} is not JSON ({error.msg}); correct the line.") from error
    turns = record.get("turns") if isinstance(record, dict) else None
    name = record.get("id", record.get("question_id")) if isinstance(record, dict) else None
    if name is None or not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        raise CoralError(f'{where} must hold "id" (or "question_id") and "turns", a list of strings.')
    return Prompt(str(name), str(record.get("category", "")), tuple(turns))
