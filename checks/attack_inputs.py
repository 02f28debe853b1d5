"""Tries that damage what is read: training records, and files that CORAL wrote."""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from damage import FILES, ODD, damaged, nodes, ours
from tiny_tokenizer import tiny_tokenizer

from coral.data.chat_format import ChatFormat
from coral.data.conversations import BadRecordError, Conversation, Dropped, parse, read
from coral.errors import CoralError

Try = Callable[[random.Random], None]

_SAID: list[Any] = [
    {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say it"}]},
    {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "a"},
                  {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
                  {"role": "assistant", "content": "d", "finished": False}]},
    {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two\n\nthree"}]},
    {"conversations": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
     "system": "s"},
    {"messages": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "q"}]},
    {"prompt": "why", "completion": "because"},
    {"prompt": [{"role": "user", "content": "why"}], "completion": [{"role": "assistant", "content": "so"}]},
    {"instruction": "do", "input": "this", "output": "done"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "part"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "whole"}]}]},
]  # fmt: skip
_TEXTS = ["", " ", "\n", "<think>\nhm\n</think>\n\nyes", "<|im_end|>", "<s>", "é\u0301", "\ud800", "\x00",
          "a" * 3000, "{{ messages }}", "{% raise %}", "👩‍👩‍👧", "\u202e", "</s>"]  # fmt: skip


def mutated(record: Any, draw: random.Random) -> Any:
    """A record with up to three values dropped, doubled, replaced or retyped."""
    record = copy.deepcopy(record)
    for _ in range(draw.randrange(4)):
        places = [(container, key) for container, key in nodes(record)]
        if not places:
            break
        container, key = draw.choice(places)
        how = draw.randrange(5)
        if how == 0:
            del container[key]
        elif how == 1:
            container[key] = copy.deepcopy(draw.choice(ODD))
        elif how == 2:
            container[key] = draw.choice(_TEXTS)
        elif isinstance(container, list):
            container.insert(draw.randrange(len(container) + 1), copy.deepcopy(draw.choice(container)))
        else:
            name = draw.choice(["role", "content", "from", "value", "messages", "text", key])
            container[name] = copy.deepcopy(container[key])
    return record


def records(place: Path) -> Try:
    """A record, and now and then a file of them: read or refused with a reason; what is trained was said."""
    chat = ChatFormat(tiny_tokenizer())
    file = place / "records"

    def in_file(draw: random.Random) -> None:
        made = [mutated(draw.choice(_SAID), draw) for _ in range(draw.randrange(1, 6))]
        if draw.random() < 0.3:
            text = json.dumps(made, indent=draw.choice([None, 1]))
        else:
            text = "\n".join(map(json.dumps, made))
        content = text.encode(draw.choice(["utf-8", "utf-8-sig", "utf-16", "utf-16-le"]))
        content = gzip.compress(content) if draw.random() < 0.2 else content
        for _ in range(draw.randrange(3)):
            at = draw.randrange(len(content) + 1)
            content = content[:at] + draw.choice([b"", draw.randbytes(2), b"[" * 3000]) + content[at + 1 :]
        file.write_bytes(content)
        dropped = Dropped()
        found = list(read([file], dropped, prompts_only=draw.random() < 0.3))
        assert dropped.read == len(found) + dropped.total, "a record was neither read nor counted"

    def once(draw: random.Random) -> None:
        if draw.random() < 0.1:
            with suppress(CoralError):
                in_file(draw)
            return
        record = mutated(draw.choice(_SAID), draw)
        try:
            messages = parse(record)
            example = chat.encode(Conversation("here:1", messages), last_turn_only=draw.random() < 0.3)
        except (BadRecordError, CoralError):
            return
        assert len(example.input_ids) == len(example.loss_mask) and any(example.loss_mask)
        said = {m["content"].strip() for m in messages if m["role"] == "assistant"}
        for run in _runs(example.input_ids, example.loss_mask):
            text = chat.tokenizer.decode(run, skip_special_tokens=True).strip()
            assert text in said, f"{text!r} is trained, but {said} was said"

    return once


def _runs(ids: list[int], mask: list[bool]) -> list[list[int]]:
    """The ids that are trained, apart where there is something between them."""
    runs: list[list[int]] = []
    for at, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        if trained and (at == 0 or not mask[at - 1]):
            runs.append([])
        if trained:
            runs[-1].append(token)
    return runs


def files(place: Path) -> Try:
    """A file of ours, damaged: read, or refused by a sentence that names it."""
    ours(place)
    whole = {kind: (place / name).read_bytes() for kind, (name, _) in FILES.items()}
    weights = (place / "model.safetensors").read_bytes()
    for _, reader in FILES.values():
        reader(place)

    def once(draw: random.Random) -> None:
        kind = draw.choice([*FILES, "weights"])
        if kind == "weights":
            name, reader, content = "model.safetensors", FILES["drafter"][1], weights
            at = draw.randrange(draw.choice([200, len(content)]))
            content = content[:at] + draw.choice([b"", draw.randbytes(3) + content[at + 3 :]])
        else:
            name, reader = FILES[kind]
            content = damaged(whole[kind], draw)
            if draw.random() < 0.2 and content.strip():
                with suppress(ValueError, IndexError):  # no JSON any more
                    content = damaged(content, draw)
        before = (place / name).read_bytes()
        try:
            (place / name).write_bytes(content)
            reader(place)
        except CoralError as error:
            assert str(place) in str(error) and "Traceback" not in str(error), error
        finally:
            (place / name).write_bytes(before)

    return once
