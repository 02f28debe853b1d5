"""Benchmark prompts: some suites ship with the package, any other is read from a JSONL file or from the
held-out prompts of a prepared data directory.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from coral.data import prepared
from coral.errors import CoralError
from coral.suites import follow_eval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# By name the number of prompts: what speed is measured on by default, and all that ship.
SUITES = {"mt_bench": 80, "humaneval": 164, "gsm8k": 1319}
SHIPPED = SUITES | {follow_eval.NAME: 224}

# What Spec-Bench calls a category, by the suite that it reports: MT-bench's eight are one.
SPEC_BENCH = dict.fromkeys(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"), "mt_bench"
) | {name: name for name in ("translation", "summarization", "qa", "math_reasoning", "rag")}

HELD_OUT = "held_out"  # what the prompts of a prepared data directory are called

# HumanEval prompts are the beginning of a function; a chat model is asked to go on, as in EAGLE's evaluation.
HUMANEVAL_INSTRUCTION = "Complete the following Python function.\n\n```python\n{prompt}```"


@dataclass(frozen=True)
class Prompt:
    """One conversation: each turn is what the user says; the answers between them are the target's own.

    ids: token ids of the whole prompt instead of turns, when it is rendered already; then it has one turn.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    ids: tuple[int, ...] = ()

    @property
    def num_turns(self) -> int:
        return 1 if self.ids else len(self.turns)


def load(names: str | Iterable[str], limit: int | None = None) -> dict[str, list[Prompt]]:
    """Prompts by suite.

    Args:
        names: suites, as a list or separated by commas: mt_bench, humaneval, gsm8k, follow_eval, the path of
            a JSONL file with {"id" or "question_id", "turns"} in each line (the format of Spec-Bench and
            EAGLE), or a prepared data directory, whose held-out prompts become the suite held_out. A file in
            which every line has a "category" of Spec-Bench becomes the suites that it reports
            (arXiv 2401.07851): mt_bench, translation, summarization, qa, math_reasoning, rag.
        limit: the first so many prompts of each suite; None takes all.

    Raises:
        CoralError: an unknown suite, or a line or directory that cannot be read.
    """
    if limit is not None and limit < 1:
        raise CoralError(f"limit is {limit}, but at least one prompt of each suite is needed.")
    wanted = _split(names)
    if not wanted:
        raise CoralError(f"no suite was named; use some of {', '.join(SHIPPED)} or the path of a JSONL file.")
    suites: dict[str, list[Prompt]] = {}
    for name in wanted:
        for key, prompts in _by_suite(name, _read(name)).items():
            if key in suites or key == "all":
                raise CoralError(
                    f"suite {key!r} of {name} is named twice or reserved; rename it or leave one out."
                )
            suites[key] = prompts[:limit]
    return suites


def check(
    names: str | Iterable[str], vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Refuse held-out prompts that were prepared with another tokenizer than the target's.

    Raises:
        CoralError: see `prepared.check`.
    """
    for name in _split(names):
        if name not in SHIPPED and Path(name).is_dir():
            prepared.check(prepared.load(name).info, vocab_size, tokenizer)


def render(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt, answers: Sequence[str] = ()
) -> list[int]:
    """Token ids of a conversation up to where the target answers the turn after `answers`.

    Without a chat template the turns and answers follow each other, separated by blank lines.
    """
    if prompt.ids:
        return list(prompt.ids)
    if tokenizer is None:
        raise CoralError("the target has no tokenizer, so prompts cannot be read; load it with one.")
    turns = prompt.turns[: len(answers) + 1]
    texts = [text for pair in zip(turns, [*answers, ""], strict=True) for text in pair][:-1]
    if tokenizer.chat_template is None:
        return list(tokenizer("\n\n".join(texts))["input_ids"])
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def answer(tokenizer: PreTrainedTokenizerBase | None, tokens: Sequence[int], eos_ids: frozenset[int]) -> str:
    """The text up to the end token. What follows it was written only to be timed."""
    assert tokenizer is not None
    end = next((index for index, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return str(tokenizer.decode(list(tokens[:end]), skip_special_tokens=True))


def _split(names: str | Iterable[str]) -> list[str]:
    parts = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in parts if name.strip()]


def _by_suite(name: str, prompts: list[Prompt]) -> dict[str, list[Prompt]]:
    """One suite, unless these are several of Spec-Bench's: then those, in the order of the file."""
    if name in SHIPPED or Path(name).is_dir():
        return {name if name in SHIPPED else HELD_OUT: prompts}
    suites: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        suites.setdefault(SPEC_BENCH.get(prompt.category), []).append(prompt)
    several = {suite: found for suite, found in suites.items() if suite is not None}
    # MT-bench alone keeps the name of its file: its categories are words that others use too.
    return several if len(several) == len(suites) > 1 else {Path(name).stem: prompts}


def _read(name: str) -> list[Prompt]:
    if name not in SHIPPED and Path(name).is_dir():
        prompts = [
            # Named by its content, so that benches on different data are never taken for one.
            Prompt(f"{crc32(json.dumps(ids).encode()):08x}", "", (), tuple(ids))
            for ids in prepared.load(name).held_out_prompts
        ]
        if not prompts:
            raise CoralError(f"{name} holds no held-out prompts; prepare it with --held-out above 0.")
        return prompts
    if name == follow_eval.NAME:
        return [Prompt(item.id, item.dimension, (item.prompt,)) for item in follow_eval.items()]
    if name in SHIPPED:
        packed = files("coral.suites").joinpath("data", f"{name}.jsonl.gz").read_bytes()
        text = gzip.decompress(packed).decode("utf-8")
    else:
        path = Path(name)
        if not path.is_file():
            raise CoralError(
                f"suite {name!r} is neither a file nor one of {', '.join(SHIPPED)}; "
                f"name one of these, a JSONL file or prepared data."
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
    except (ValueError, RecursionError) as error:
        raise CoralError(f"{where} is not JSON ({str(error)[:100]}); correct the line.") from error
    turns = record.get("turns") if isinstance(record, dict) else None
    name = record.get("id", record.get("question_id")) if isinstance(record, dict) else None
    if name is None or not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        raise CoralError(f'{where} must hold "id" (or "question_id") and "turns", a list of strings.')
    return Prompt(str(name), str(record.get("category", "")), tuple(turns))
