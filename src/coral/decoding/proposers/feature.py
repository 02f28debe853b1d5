"""A drafter grows the tree, with coupled drafting.

Row t of the drafter pairs the feature of position t with token t + 1 and predicts the feature of position
t + 1, whose head output proposes token t + 2. Its KV cache keeps only rows made from true target features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from coral.cache import KVCache, pack
from coral.compiled import compiled, fix, fixed_cache
from coral.decoding.growth import Growth, Rows
from coral.decoding.state import Committed, State
from coral.decoding.tree import Budget, DraftTree
from coral.drafter.drafter import Drafter
from coral.drafter.heads import FullHead, Head
from coral.packed import pack_linears
from coral.target import Target

_POOL = 256  # ids per node that compete after the noise is added: the sampled id is rarely outside
_STEP, _MOST = 8, 32  # a compiled draft step has 8, 16, 24 or 32 rows, as many as a level needs


class Feature:
    """Proposes with a trained drafter; sequences that decode together share a forward a level.

    Args:
        target: if its forward is compiled, draft steps of one sequence are too.
        coupled: at temperature > 0 rank children by log q plus the noise that the target's sampler will add
            at that position, so that the drafted child tends to be the token the target samples.
    """

    def __init__(
        self, drafter: Drafter, target: Target, head: Head | None = None, coupled: bool = True
    ) -> None:
        self.drafter, self.target, self.coupled = drafter.eval(), target, coupled
        self.head = head or FullHead(target)
        pack_linears(drafter)
        self._compiled = compiled(self._fixed_step, target.device) if target.sizes else None

    @torch.inference_mode()
    def propose(
        self, states: Sequence[State], committed: Sequence[Committed], budget: Budget
    ) -> list[DraftTree]:
        caches = [self._cache(state, budget) for state in states]
        roots = self._read(caches, committed, budget)
        growths = [
            Growth(state.tokens[-1], cache.length, budget.within(state.remaining), self.target.device)
            for state, cache in zip(states, caches, strict=True)
        ]
        live = [i for i in roots if growths[i].wants_more]
        features = torch.cat([roots[i] for i in live]) if live else torch.empty(0)
        while live:
            levels = self._children([states[i] for i in live], [growths[i] for i in live], features, budget)
            for i, (ids, scores), drafted in zip(live, levels, features.chunk(len(live)), strict=True):
                growths[i].add(ids, scores, drafted)
            live = [i for i in live if growths[i].wants_more]
            if live:
                features = self._forward([caches[i] for i in live], [growths[i].rows() for i in live], budget)
        for cache, growth in zip(caches, growths, strict=True):
            cache.keep(growth.length)
        return [growth.finish() for growth in growths]

    def _cache(self, state: State, budget: Budget) -> KVCache:
        if not isinstance(state.memory, KVCache):
            room = budget.top_k * budget.max_depth + _MOST
            state.memory = KVCache(len(self.drafter.layers), state.max_length + room)
        return state.memory

    def _read(
        self, caches: Sequence[KVCache], committed: Sequence[Committed], budget: Budget
    ) -> dict[int, Tensor]:
        """Feed the accepted pairs; the last row's output is the root's draft feature, [1, h] by sequence."""
        rows: dict[int, Rows] = {}
        for i, (cache, pairs) in enumerate(zip(caches, committed, strict=True)):
            cache.keep(min(cache.length, pairs.start))
            if pairs.tokens:
                device = pairs.features.device
                keys = torch.arange(cache.length + len(pairs.tokens), device=device)
                positions = keys[cache.length :]
                ids = torch.tensor(pairs.tokens, device=device)
                rows[i] = Rows(ids, pairs.features, positions, keys[None, :] <= positions[:, None])
        if not rows:
            return {}
        features = self._forward([caches[i] for i in rows], [*rows.values()], budget)
        pieces = features.split([len(row.ids) for row in rows.values()])
        return {i: piece[-1:] for i, piece in zip(rows, pieces, strict=True)}

    def _forward(self, caches: Sequence[KVCache], rows: Sequence[Rows], budget: Budget) -> Tensor:
        """Draft features [N, h] of all rows, sequence after sequence; the caches take their keys, values.

        Compiled are the widths of one sequence's levels: to compile for a path that is longer once would
        stop the text for seconds.
        """
        if len(rows) == 1:
            ids, features, positions, allowed = rows[0]
        else:
            ids, features, positions = (torch.cat([row[part] for row in rows]) for part in range(3))
            allowed = torch.block_diag(*(row.allowed for row in rows)).bool()
        count = len(ids)
        size, widest = (-(-n // _STEP) * _STEP for n in (count, min(budget.top_k, _MOST)))
        if self._compiled is None or len(rows) > 1 or size > widest or caches[0].length == 0:
            cache = pack(list(caches), [len(row.ids) for row in rows])
            return self._step(ids, features, positions, allowed[None], cache)
        padded, slots, storage = fix(caches[0], size, allowed[None])
        ids, positions = (pad(part, (0, size - count)) for part in (ids, positions))
        features = pad(features, (0, 0, 0, size - count))
        return self._compiled(ids, features, positions, padded, slots, *storage)[:count]

    def _fixed_step(
        self,
        ids: Tensor,
        features: Tensor,
        positions: Tensor,
        allowed: Tensor,
        slots: Tensor,
        *storage: Tensor,
    ) -> Tensor:
        return self._step(ids, features, positions, allowed, fixed_cache(slots, storage))

    def _step(
        self, ids: Tensor, features: Tensor, positions: Tensor, allowed: Tensor, cache: Cache
    ) -> Tensor:
        embeddings = self.target.embed(ids)[None]
        output = self.drafter(embeddings, features[None], positions[None], cache, allowed)
        return self.drafter.feedback(output)[0]

    def _children(
        self, states: Sequence[State], growths: Sequence[Growth], features: Tensor, budget: Budget
    ) -> list[tuple[Tensor, Tensor]]:
        """The top_k children of each frontier node: ids and path scores, both [n, k], by sequence.

        Coupled: the score of a child is log softmax(log q + T * noise), the posterior that it is the target's
        sample if target and drafter logits differ by a unit Gumbel; at T = 0 it is log q.
        """
        above = [growth.frontier_scores for growth in growths]
        coupled = self.coupled and any(state.sampling.temperature > 0 for state in states)
        count = _POOL if coupled else budget.top_k
        ids, log_probs = self.head.topk(features, count, states, torch.cat(above))
        children = []
        for i, (found, values) in enumerate(
            zip(ids.chunk(len(states)), log_probs.chunk(len(states)), strict=True)
        ):
            if coupled:
                found, values = _best(states[i], growths[i].depth, found, values, budget.top_k)
            # Rounding may lift a certain child above 0, hence above its parent: the total order forbids that.
            children.append((found, above[i][:, None] + values.clamp(max=0)))
        return children


def _best(state: State, depth: int, ids: Tensor, log_probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Of ids and log-probabilities [n, pool], likeliest first, the best top_k under the sampler's noise."""
    sampling = state.sampling
    if sampling.temperature > 0:
        position = torch.tensor([len(state.tokens) + depth], device=ids.device)
        noise = sampling.noise(position, state.sequence_id, ids)
        log_probs = ((sampling.process(log_probs) + noise) * sampling.temperature).log_softmax(-1)
    values, best = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1)
    return ids.gather(-1, best), values
