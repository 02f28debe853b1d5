"""What belongs to one sequence, and what one cycle of it yields."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from coral.cache import KVCache
from coral.decoding.log_probs import LogProbs
from coral.decoding.sampling import Sampling
from coral.target.ids import check_ids
from coral.target.target import Target
from coral.tree import DraftTree

_PREFILL_CHUNK = 512
_SCORED_CHUNK = 64  # tokens whose logits for the whole vocabulary are there at once


@dataclass(frozen=True)
class Unread:
    """Target states that no drafter has read: those of the rows `start` to `end` of the target's cache.

    parts: the states in pieces, [n, h] each.
    """

    start: int = 0
    parts: tuple[Tensor, ...] = ()

    @property
    def end(self) -> int:
        return self.start + sum(map(len, self.parts))

    @property
    def features(self) -> Tensor:
        """[end - start, h]; there must be one at least."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def up_to(self, end: int) -> Unread:
        """Without the rows from `end` on."""
        if end <= self.start:
            return Unread(end)
        return self if end >= self.end else Unread(self.start, (self.features[: end - self.start],))


@dataclass(eq=False)
class State:
    """One sequence: its tokens, caches, seed and sequence id.

    Between cycles the cache holds a row for every token but the last, the root of the next draft tree.

    tokens: prompt and everything written so far.
    max_length: no token is written past this length.
    min_length: in front of this length no end token is written, and no stop string is looked for.
    cache: the target's keys and values.
    eos_ids: the sequence ends after one of these (empty: never).
    stop: given the tokens written so far, whether the sequence ends there (stop strings); None: never.
    drafts: whether a server drafts for it; the text is the same without.
    log_probs: notes the log-probabilities of its tokens; None: nobody wants them.
    layers: the target states that are kept for a drafter, see `Target.verify`.
    unread: those that the drafter has not read yet.
    memory: what each proposer remembers of the sequence (draft KV cache, n-gram index).
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
    min_length: int = 0
    drafts: bool = True
    log_probs: LogProbs | None = None
    layers: tuple[int, ...] = ()
    unread: Unread = field(default_factory=Unread)
    memory: dict[Hashable, Any] = field(default_factory=dict)
    cycle: Cycle | None = None
    tree: DraftTree | None = None
    logits: Tensor | None = None
    prompt_length: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self.prompt_length = self.prompt_length or len(self.tokens)
        self.done = self.remaining <= 0

    @classmethod
    def begin(
        cls, target: Target, prompt: Sequence[int], max_new_tokens: int, nodes: int = 0, **options: Any
    ) -> State:
        """A sequence that begins with `prompt`, with a cache for its text and a draft tree of `nodes`."""
        end = min(len(prompt) + max_new_tokens, target.context_length)
        return cls(list(prompt), end, target.new_cache(end + nodes + 1), **options)

    @property
    def remaining(self) -> int:
        """How many tokens may still be written."""
        return self.max_length - len(self.tokens)

    @property
    def written(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def unread_tokens(self) -> list[int]:
        """Behind each unread row the token that follows it: the pair that a drafter reads."""
        return self.tokens[self.unread.start + 1 : self.unread.end + 1]

    def continue_with(self, tokens: list[int], max_length: int) -> None:
        """Take `tokens` as the new prompt and keep the cached rows that it shares with the old text."""
        # A drafter pairs a row with the token behind it, so the last shared row is read again.
        self.unread = self.unread.up_to(max(0, _shared(self.tokens, tokens) - 1))
        self.tokens, self.max_length, self.prompt_length = list(tokens), max_length, len(tokens)
        self.done = self.remaining <= 0

    def prefill(self, target: Target, layers: tuple[int, ...]) -> None:
        """Read every token but the last, the first root, into the cache, in chunks, without logits.

        Raises:
            CoralError: see `ids.check_ids`.
        """
        self.open(target, layers)
        while self.read(target, _PREFILL_CHUNK):
            pass

    def open(self, target: Target, layers: tuple[int, ...]) -> None:
        """Make ready to `read`. Rows stay that were read before, but for those that an interrupted cycle
        left. One at least is unread then, since a drafter drafts from it.

        Raises:
            CoralError: see `ids.check_ids`.
        """
        if layers != self.layers:
            self.layers, self.unread = layers, Unread()
        end = len(self.tokens) - 1
        self.unread = self.unread.up_to(end)
        if layers and not self.unread.parts:
            self.unread = Unread(max(0, min(self.unread.start, end - 1)))
        self.cache.keep(self.unread.end)
        check_ids(target, self.tokens[self.unread.end :])

    @torch.inference_mode()
    def read(self, target: Target, most: int) -> bool:
        """Read at most so many of the tokens in front of the last one; whether some are left."""
        start, end = self.unread.end, len(self.tokens) - 1
        if piece := self.tokens[start : min(start + most, end)]:
            if self._scores_prompt:
                piece = piece[:_SCORED_CHUNK]
                states = self._score(target, piece)
            else:
                states = target.read(self.cache, piece, self.layers)
            self._note(states, len(piece))
        return self.unread.end < end

    @property
    def _scores_prompt(self) -> bool:
        return self.log_probs is not None and self.log_probs.prompt

    def _score(self, target: Target, piece: list[int]) -> Tensor | None:
        """Read a piece as `Target.read` does, and note the log-probabilities of the tokens behind it."""
        assert self.log_probs is not None
        start, chain = self.cache.length, DraftTree.chain(piece)
        (logits,), (states,) = target.verify([self.cache], [chain], self.layers)
        self.log_probs.note(logits, self.tokens[start + 1 : start + 1 + len(piece)])
        return states

    def shares(self, other: State) -> int:
        """How many rows of another text's cache could be the first of this one's, which has yet to be read.
        One at least is left to read, from which a drafter drafts; all, where their logits are wanted.
        """
        if self._scores_prompt:
            return 0
        shared = _shared(self.tokens, other.tokens)
        return max(0, min(shared - 1, other.unread.end, len(self.tokens) - 2))

    @torch.inference_mode()
    def take(self, other: State, rows: int) -> None:
        """Copy the first `rows` of another text's caches, whose tokens both share, in place of what was read.
        Of a proposer's memory that is its keys and values; the rest it makes of the tokens anew.
        """
        self.unread = other.unread.up_to(rows)
        self.cache = other.cache.copy(rows, self.cache.capacity)
        for proposer, cache in other.memory.items():
            if isinstance(cache, KVCache):
                room = max(0, cache.capacity - other.max_length) + self.max_length
                self.memory[proposer] = cache.copy(min(cache.length, self.unread.start), room)

    def _note(self, states: Tensor | None, rows: int) -> None:
        """The cache has `rows` more, whose states nobody has read."""
        unread = self.unread
        self.unread = (
            Unread(unread.end + rows) if states is None else replace(unread, parts=(*unread.parts, states))
        )

    def has_read(self) -> None:
        """To be called by the drafter once its tree stands: one that is interrupted before reads again."""
        self.unread = Unread(self.unread.end)

    def sample(self) -> Tensor:
        """[N] int64, the token that the target writes behind each node of the tree that was verified last."""
        assert self.tree is not None and self.logits is not None
        early = bool(self.eos_ids) and len(self.tokens) < self.min_length
        positions = len(self.tokens) + self.tree.depth if self.sampling.temperature or early else None
        logits = self.logits
        if early and positions is not None:  # a rule of the position alone, so that any tree is lossless
            ends = torch.tensor(sorted(self.eos_ids), device=logits.device)
            kept = logits.index_fill(-1, ends, -torch.inf)
            logits = torch.where((positions < self.min_length)[:, None], kept, logits)
        return self.sampling.sample(logits, positions, self.sequence_id)

    def keep(self, tree: DraftTree, sample: list[int], states: Tensor | None) -> Cycle:
        """Walk the verified tree, write the path's tokens, and drop all rows of the cache but the path's.

        sample: of each node the token that the target writes behind it. states: [N, h] or None, of its nodes.
        """
        start, path = len(self.tokens) - 1, tree.walk(sample)
        emitted = [sample[node] for node in path]
        taken = self.extend(emitted)
        kept = path[:taken]  # the end may fall inside the path: the cache is cut there too
        with torch.inference_mode():
            self.cache.keep(start, kept)
            if states is not None:
                states = states[:taken] if kept[-1] == taken - 1 else states[kept]
        if self.log_probs is not None and self.logits is not None:
            self.log_probs.note(self.logits[kept], emitted[:taken])
        self._note(states, taken)
        nodes, accepted, cut = len(tree) - 1, len(path) - 1, taken < len(emitted)
        self.cycle = Cycle(emitted[:taken], nodes, accepted, tree.max_depth, tree.num_forwards, cut)
        return self.cycle

    def extend(self, tokens: list[int]) -> int:
        """Append emitted tokens up to the first that ends the sequence; return how many were taken."""
        for taken, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if self.remaining <= 0 or self.is_at_end:
                self.done = True
                return taken
        return len(tokens)

    @property
    def is_at_end(self) -> bool:
        """Whether its last token ends the text: an end token, or one that completes a stop string."""
        if self.tokens[-1] in self.eos_ids:
            return True
        return self.stop is not None and self.stop(self.tokens[max(self.prompt_length, self.min_length) :])


@dataclass
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
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    seconds: float = 0.0


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
