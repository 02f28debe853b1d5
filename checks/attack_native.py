"""Tries at the boundary of native code, and of the promise that no draft changes a text."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tiny import CONFIGS, HEADS, Bushes, new_state, prompt_of, tiny_model
from tiny_pair import NATIVE, save_target

from coral.api import LLM, load
from coral.decoding.cycle import generate
from coral.decoding.merged import Merged
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.drafters.feature.propose import Feature
from coral.drafters.lookup import NGram
from coral.errors import CoralError
from coral.target.target import Target
from coral.tree import TreeSize

Try = Callable[[random.Random], None]

_NUMBERS = [-(2**63), -(2**31), -5, -1, 0, 1, 2, 3, 7, 269, 270, 271, 1000, 4096, 4097, 2**31, 2**63, 2**70]
_OTHERS = [
    None,
    True,
    1.0,
    1.5,
    float("nan"),
    float("inf"),
    "1",
    "",
    b"x",
    [],
    [1],
    {},
    torch.tensor(3),
    "\udcff",
]
_SIZES = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 48}  # that fill vectors


def boundary(place: Path) -> Try:
    """Numbers, and what is none, for ids, trees, options and drafters' sizes: a text, or a CoralError."""
    save_target(place / "t", **NATIVE)
    target = Target.load(place / "t")
    config = DrafterConfig.for_target(target.config)
    pairs = [load(target, drafter, fallback=False) for drafter in ("plain", "ngram", Drafter(config))]
    vocabulary = target.vocab_size

    def number(draw: random.Random) -> Any:
        return draw.choice(_NUMBERS) if draw.random() < 0.8 else draw.choice(_OTHERS)

    def ids(draw: random.Random) -> None:
        prompt: Any = [draw.randrange(vocabulary) for _ in range(draw.randrange(1, 6))]
        if draw.random() < 0.7:
            prompt[draw.randrange(len(prompt))] = number(draw)
        elif draw.random() < 0.3:
            prompt = number(draw)
        written = [i for cycle in draw.choice(pairs).stream(prompt, max_new_tokens=3) for i in cycle.tokens]
        assert all(type(i) is int and 0 <= i < vocabulary for i in written)

    def options(draw: random.Random) -> None:
        names = ["max_new_tokens", "temperature", "top_k", "top_p", "seed", "sequence_id", "stop"]
        chosen = {name: number(draw) for name in draw.sample(names, draw.randrange(1, 3))}
        if "max_new_tokens" not in chosen:
            chosen["max_new_tokens"] = 3
        for count, _ in enumerate(draw.choice(pairs).stream([5, 6, 7], **chosen)):
            if count > 3:
                break

    def trees(draw: random.Random) -> None:
        sizes = [draw.choice([1, 2, 3, 8, 40]) for _ in range(3)]
        if draw.random() < 0.7:
            sizes[draw.randrange(3)] = number(draw)
        tree_size = TreeSize(*sizes, draw.choice([0, 0.1, 1, -1, float("nan"), 2, "x"]))
        pair = draw.choice(pairs)
        for count, _ in enumerate(
            LLM(pair.target, pair.proposer, tree_size).stream([5, 6, 7], max_new_tokens=4)
        ):
            assert count < 5

    def drafters(draw: random.Random) -> None:
        sizes = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                 "vocab_size", "num_layers"]  # fmt: skip
        changed = {
            name: draw.choice([-1, 0, 1, 2, 3, 4, 8, 16, 31, 32, 48, 270]) for name in draw.sample(sizes, 2)
        }
        if min(changed.values()) < 1:
            return  # which the schema of the file refuses, a kind of its own
        try:
            drafter = Drafter(DrafterConfig.for_target(target.config, **changed))
        except CoralError:
            raise
        except Exception:  # transformers' own refusal, which the loader turns into a sentence
            return
        list(load(target, drafter, fallback=False).stream([5, 6, 7], max_new_tokens=4))

    def resized(draw: random.Random) -> None:
        fresh = load(Target.load(place / "t"), draw.choice(["plain", "ngram"]), fallback=False)
        list(fresh.stream([5, 6, 7], max_new_tokens=2))
        model = fresh.target.model
        if draw.random() < 0.6:
            model.resize_token_embeddings(draw.choice([20, 200, 300, 600]), mean_resizing=False)
        else:
            model.to(draw.choice([torch.bfloat16, torch.float64, torch.float32]))
        list(fresh.stream([draw.randrange(600) for _ in range(3)], max_new_tokens=2))

    ways = [ids, options, trees, drafters, resized]

    def once(draw: random.Random) -> None:
        with suppress(CoralError):
            draw.choices(ways, [4, 3, 3, 1, 0.2])[0](draw)

    return once


def texts(place: Path) -> Try:
    """A random model, prompt, sampling, proposer and tree: the text is that of plain decoding, id for id."""
    made: dict[str, Target] = {}

    def target_of(draw: random.Random) -> Target:
        kind, native = draw.choice(sorted(CONFIGS)), draw.random() < 0.5
        name = f"{kind} {native}"
        if name not in made:
            target = Target(tiny_model(kind, **(_SIZES if native and "phi3" not in kind else {})), name=name)
            made[name] = target.on() if native else target
        return made[name]

    def proposer_of(draw: random.Random, target: Target, text: list[int]) -> Any:
        torch.manual_seed(draw.randrange(1000))
        drafter = Drafter(DrafterConfig.for_target(target.config))
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.mul_(draw.choice([1, 5]))
        head = draw.choice([None, *HEADS.values()])
        feature = Feature(drafter, target, None if head is None else head(target), draw.random() < 0.5)
        kinds = [
            feature,
            NGram(),
            Merged(feature, NGram()),
            Bushes([text], target.vocab_size, draw.randrange(99)),
        ]
        return draw.choice(kinds)

    def once(draw: random.Random) -> None:
        target = target_of(draw)
        prompt = prompt_of(draw.randrange(1, 24), target.vocab_size, draw.randrange(10**6))
        sampling = Sampling(
            draw.choice([0.0, 0.0, 0.3, 1.0, 2.0]),
            draw.choice([0, 0, 1, 4]),
            draw.choice([1.0, 1.0, 0.5, 0.9]),
            draw.randrange(2**63),
        )
        new, row = draw.randrange(1, 20), draw.randrange(2**31)
        eos = frozenset(draw.sample(range(target.vocab_size), draw.randrange(3)))

        def written(proposer: Any, tree_size: TreeSize, count: int) -> list[list[int]]:
            states = [
                new_state(target, prompt, new, sampling, sequence_id=row + i, eos_ids=eos)
                for i in range(count)
            ]
            for _ in generate(target, proposer, states, tree_size):
                pass
            return [state.tokens for state in states]

        plain = written(Plain(), TreeSize(1, 0, 1), 1)[0]
        tree_size = TreeSize(
            draw.randrange(1, 9), draw.randrange(8), draw.randrange(1, 24), draw.choice([0, 0.1, 0.5])
        )
        proposer = proposer_of(draw, target, plain)
        if isinstance(proposer, Bushes):
            proposer.texts = {row: plain}  # type: ignore[assignment]
        found = written(proposer, tree_size, 1)[0]
        assert found == plain, f"{target.name}, {tree_size}, {sampling}: {found} is not {plain}"

    return once
