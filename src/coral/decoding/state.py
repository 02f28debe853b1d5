"""What belongs to one sequence, and what one cycle of it yields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coral.cache import KVCache
from coral.decoding.sampling import Sampling
from coral.tree import DraftTree


@dataclass(eq=False)
class State:
    """One sequence: its tokens, caches, seed and sequence id.

    Between cycles the cache holds a row for every token but the last, the root of the next draft tree.

    tokens: prompt and everything written so far.
    max_length: no token is written past this length.
    eos_ids: the sequence ends after one of these (empty: never).
    stop: given the tokens written so far, whether the sequence ends there (stop strings); None: never.
    cache: the target's keys and values.
    memory: the proposer's own per-sequence memory, made by it (draft KV cache, n-gram index).
    cycle: the last cycle, for a proposer that learns from it.
    tree, logits: the draft tree that was verified last, and the target's logits at its nodes, [N, V]; what a
    head may learn from.
    """

    tokens: list[int]
    max_length: int
    cache: KVCache
    sampling: Sampling = field(default_factory=Sampling)
    sequence_id: int = 0
    eos_ids: frozenset[int] = frozenset()
    stop: Callable[[list[int]], bool] | None = None
    memory: Any = None
    cycle: Cycle | None = None
    tree: DraftTree | None = None
    logits: Tensor | None = None
    prompt_length: int = 0
    rows_read: int = 0  # rows whose features the proposer has been given
    done: bool = False

    def __post_init__(self) -> None:
        self.prompt_length = self.prompt_length or len(self.tokens)
        self.done = self.remaining <= 0

    @property
    def remaining(self) -> int:
        """How many tokens may still be written."""
        return self.max_length - len(self.tokens)

    @property
    def written(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    def go_on(self, tokens: list[int], max_length: int) -> None:
        """Take `tokens` as the new prompt and keep the cached rows that it shares with the old text."""
        shared = 0
        for old, new in zip(self.tokens, tokens, strict=False):
            if old != new:
                break
            shared += 1
        # A proposer's row pairs a feature with the token after it, so the last shared row is read again.
        self.rows_read = max(0, min(shared - 1, self.rows_read))
        self.tokens, self.max_length, self.prompt_length = list(tokens), max_length, len(tokens)
        self.done = self.remaining <= 0
        self.rewind()

    def rewind(self) -> None:
        """Drop cached rows that the proposer has not read, whatever an interrupted cycle left there.

        At least one row before the root is left to be read, since a proposer drafts from its feature.
        """
        self.rows_read = max(0, min(self.rows_read, len(self.tokens) - 2))
        self.cache.keep(self.rows_read)

    def sample(self) -> Tensor:
        """[N] int64, the token that the target writes behind each node of the tree that was verified last."""
        assert self.tree is not None and self.logits is not None
        positions = len(self.tokens) + self.tree.depth if self.sampling.temperature else None
        return self.sampling.sample(self.logits, positions, self.sequence_id)

    def extend(self, tokens: list[int]) -> int:
        """Append emitted tokens up to the first that ends the sequence; return how many were taken."""
        for taken, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if (
                token in self.eos_ids
                or self.remaining <= 0
                or (self.stop is not None and self.stop(self.written))
            ):
                self.done = True
                return taken
        return len(tokens)


@dataclass(frozen=True)
class Committed:
    """What the target accepted since the proposer's last call: row i holds the feature of position start + i
    and the token of position start + i + 1 (the pair the drafter reads).

    tokens: k ids; features: [k, h] in the target's dtype; start: position of the first feature.
    """

    tokens: list[int]
    features: Tensor
    start: int

    @staticmethod
    def joined(parts: Sequence[Committed]) -> Committed:
        """One run of rows; where a part begins before the end of those before it, the text was rewound."""
        first, *others = parts
        for part in others:
            kept = part.start - first.start
            if kept <= 0:
                first = part
                continue
            features = torch.cat([first.features[:kept], part.features])
            first = Committed([*first.tokens[:kept], *part.tokens], features, first.start)
        return first


@dataclass(frozen=True)
class Cycle:
    """One propose, verify, walk and keep of one sequence.

    tokens: what was emitted: accepted draft tokens, then the bonus token (fewer when cut).
    num_drafted: draft tokens sent to the target. num_accepted: of those, on the path.
    depth: levels of the tree below the root. num_forwards: drafter forwards.
    cut: the sequence ended inside the path, so the cycle does not count for tau.
    draft_seconds, verify_seconds, seconds: wall time of propose, of verify, and of the whole cycle; shared by
    all sequences of the batch. A GPU is waited for in verify alone, so that its drafting counts there.
    """

    tokens: list[int]
    num_drafted: int
    num_accepted: int
    depth: int
    num_forwards: int
    cut: bool
    draft_seconds: float
    verify_seconds: float
    seconds: float
