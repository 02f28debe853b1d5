"""A drafter grows the tree level by level, with coupled drafting.

Row t of the drafter pairs a feature of position t with token t + 1 and makes the draft feature that token
t + 2 is drafted with. Its KV cache keeps only rows made from true target states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from coral.cache import KVCache, Layer, pack
from coral.decoding.state import State
from coral.device import upload
from coral.drafters.kinds import num_bytes
from coral.drafters.recurrent.growth import Growth, Rows
from coral.gpu.compiled import compiled, fix, fixed_layers
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize

_STEP, _MOST = 8, 32  # a compiled draft step has 8, 16, 24 or 32 rows, as many as a level needs


class _Text(NamedTuple):
    """One sequence while its tree grows; `length` rows of the drafter's cache are the text's."""

    state: State
    cache: KVCache
    growth: Growth
    length: int


class Grower:
    """Proposes with a trained drafter; sequences that decode together share a forward a level.

    A kind says which target states its drafter reads (`layers`), what it makes of them (`read`), which
    children a node has (`topk`), and perhaps a faster way (`at_once`).

    Args:
        target: if its forward is compiled, draft steps of one sequence are too, those that are not made at
            once.
        coupled: at temperature > 0 rank children by log q plus the noise that the target's sampler will add
            at that position, so that the drafted child tends to be the token the target samples.
    """

    layers: tuple[int, ...]
    pool = 256
    """Ids per node that compete after the noise is added: the sampled id is rarely outside."""

    def __init__(self, drafter: Any, target: Target, coupled: bool = True) -> None:
        self.drafter, self.target, self.coupled = drafter.eval(), target, coupled
        self._fixed: Callable[..., Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """See `kinds.ReadsWeights`."""
        return num_bytes(self.drafter)

    def read(self, states: Tensor) -> Tensor:
        """The features [n, h] that a draft step reads of the target's states [n, len(layers) * h]."""
        return states

    def topk(
        self, features: Tensor, k: int, states: Sequence[State], scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The k likeliest children of nodes with these draft features; see `coral.drafters.heads.store`."""
        raise NotImplementedError

    def at_once(self, states: Sequence[State], tree_size: TreeSize) -> dict[State, DraftTree]:
        """The trees of those sequences that can grow theirs together, in one call of native code."""
        return {}

    @torch.inference_mode()
    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        trees = {state: DraftTree.root(state.tokens[-1]) for state in states}
        # What has no room for a draft is left unread.
        drafting = [state for state in states if tree_size.within(state.remaining).max_depth > 0]
        grown = self.at_once(drafting, tree_size)
        rest = [state for state in drafting if state not in grown]
        trees |= grown | dict(zip(rest, self._level_by_level(rest, tree_size), strict=True))
        for state in drafting:
            state.has_read()
        return [trees[state] for state in states]

    def _level_by_level(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        """The trees of several sequences, which share a forward a level."""
        texts = [self._begin(state, tree_size) for state in states]
        live = [text for text in texts if len(text.growth.rows.ids)]
        while live:
            for text, children in zip(live, self._draft(live, tree_size), strict=True):
                text.growth.add(*children)
            live = [text for text in live if text.growth.wants_more]
        for text in texts:
            text.cache.keep(text.length)
        return [text.growth.finish() for text in texts]

    def _begin(self, state: State, tree_size: TreeSize) -> _Text:
        """The first draft step reads the unread pairs; the last row is the root."""
        cache = self.cache(state, tree_size)
        growth = Growth(state.tokens[-1], self._unread(state), tree_size.within(state.remaining))
        return _Text(state, cache, growth, state.unread.end)

    def _unread(self, state: State) -> Rows:
        """The unread pairs as a draft step reads them, behind the rows that the drafter's cache holds; none
        where the text is one token.
        """
        unread, nothing = state.unread, self.target.head_weight[:0]
        features = self.read(unread.features) if unread.parts else nothing
        keys = torch.arange(unread.end, device=nothing.device)
        positions = keys[unread.start :]
        ids = upload(state.unread_tokens, nothing.device)
        return Rows(ids, features, positions, keys[None, :] <= positions[:, None])

    def cache(self, state: State, tree_size: TreeSize) -> KVCache:
        """The drafter's cache of a sequence, cut to the rows in front of the unread ones."""
        cache: KVCache | None = state.memory.get(self)
        if cache is None:
            room = tree_size.top_k * tree_size.max_depth + _MOST
            capacity = self.target.room(state.max_length + room)
            cache = state.memory[self] = KVCache(len(self.drafter.layers), capacity)
        cache.keep(state.unread.start)
        return cache

    def _draft(self, texts: Sequence[_Text], tree_size: TreeSize) -> list[tuple[Tensor, Tensor, Tensor]]:
        """One draft step: for the n frontier nodes of each sequence, which are its last rows, the ids and
        log-probabilities [n, k] of their children, and the draft features [n, h] that they were found with.

        Coupled: these are log softmax(log q + T * noise), the posterior that a child is the target's sample
        if target and drafter logits differ by a unit Gumbel; at T = 0 it is log q.
        """
        states, growths = [text.state for text in texts], [text.growth for text in texts]
        coupled = self.coupled and any(state.sampling.temperature > 0 for state in states)
        count, n = self.pool if coupled else tree_size.top_k, len(growths[0].scores)
        rows = [growth.rows for growth in growths]
        drafted = self._forward([text.cache for text in texts], rows, tree_size.top_k)
        features = [piece[-n:] for piece in drafted.split([len(row.ids) for row in rows])]
        scores = torch.cat([growth.scores for growth in growths])
        ids, log_probs = self.topk(torch.cat(features), count, states, scores)
        children = [*zip(ids.split(n), log_probs.split(n), strict=True)]
        if coupled:
            children = [
                _best(state, growth.depth, *pool, tree_size.top_k)
                for state, growth, pool in zip(states, growths, children, strict=True)
            ]
        return [(*pair, piece) for pair, piece in zip(children, features, strict=True)]

    def _forward(self, caches: Sequence[KVCache], rows: Sequence[Rows], top_k: int) -> Tensor:
        """Draft features [N, h] of all rows, sequence after sequence; the caches take their keys, values.

        Compiled are the widths of one sequence's levels: to compile for a path that is longer once would stop
        the text for seconds.
        """
        if len(rows) == 1:
            ids, features, positions, allowed = rows[0]
        else:
            ids, features, positions = (torch.cat([row[part] for row in rows]) for part in range(3))
            allowed = torch.block_diag(*(row.allowed for row in rows)).bool()
        n = len(ids)
        size, widest = _padded(n), _padded(min(top_k, _MOST))
        if not self.target.pads or len(rows) > 1 or size > widest or caches[0].length == 0:
            layers = pack(caches, [len(row.ids) for row in rows])
            return self._step(ids, features, positions, allowed[None], layers)
        padded, slots, storage = fix(caches[0], size, allowed[None])
        ids, positions = (pad(part, (0, size - n)) for part in (ids, positions))
        features = pad(features, (0, 0, 0, size - n))
        self._fixed = self._fixed or compiled(self._fixed_step, self.target.device, inputs=5)
        return self._fixed(ids, features, positions, padded, slots, *storage)[:n]

    def _fixed_step(
        self,
        ids: Tensor,
        features: Tensor,
        positions: Tensor,
        allowed: Tensor,
        slots: Tensor,
        *storage: Tensor,
    ) -> Tensor:
        return self._step(ids, features, positions, allowed, fixed_layers(slots, storage))

    def _step(
        self, ids: Tensor, features: Tensor, positions: Tensor, allowed: Tensor, cache: Sequence[Layer]
    ) -> Tensor:
        embeddings = self.target.embed(ids)[None]
        output = self.drafter(embeddings, features[None], positions[None], cache, allowed)
        return self.drafter.feedback(output)[0]


def _padded(n: int) -> int:
    return -(-n // _STEP) * _STEP


def _best(state: State, depth: int, ids: Tensor, log_probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Of ids and log-probabilities [n, pool], likeliest first, the best top_k under the sampler's noise."""
    sampling = state.sampling
    if sampling.temperature > 0:
        position = torch.full((1,), len(state.tokens) + depth, device=ids.device)
        noise = sampling.noise(position, state.sequence_id, ids)
        log_probs = ((sampling.process(log_probs) + noise) * sampling.temperature).log_softmax(-1)
    values, best = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)
    return ids.gather(-1, best), values
