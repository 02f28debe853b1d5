"""A drafter grows the tree: EAGLE-2 growth (Li et al. 2024, arXiv 2406.16858) with coupled drafting.

Row t of the drafter pairs the feature of position t with token t + 1 and predicts the feature of position
t + 1, whose head output proposes token t + 2. Its KV cache keeps only rows made from true target features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coral.cache import KVCache
from coral.decoding.state import Committed, State
from coral.decoding.tree import Budget, DraftTree, best_nodes
from coral.drafter.drafter import Drafter
from coral.drafter.heads import FullHead, Head
from coral.packed import pack_linears
from coral.target import Target

_POOL = 256  # ids per node that compete after the noise is added: the sampled id is rarely outside


class Feature:
    """Proposes with a trained drafter.

    Args:
        coupled: at temperature > 0 rank children by log q plus the noise that the target's sampler will add
            at that position, so that the drafted child tends to be the token the target samples.
    """

    def __init__(
        self, drafter: Drafter, target: Target, head: Head | None = None, coupled: bool = True
    ) -> None:
        self.drafter, self.target, self.coupled = drafter.eval(), target, coupled
        self.head = head or FullHead(target)
        pack_linears(drafter)

    @torch.inference_mode()
    def propose(
        self, states: Sequence[State], committed: Sequence[Committed], budget: Budget
    ) -> list[DraftTree]:
        return [
            self._grow(state, rows, budget.within(state.remaining))
            for state, rows in zip(states, committed, strict=True)
        ]

    def _grow(self, state: State, committed: Committed, budget: Budget) -> DraftTree:
        cache = self._cache(state)
        feature = self._read(cache, committed)
        if feature is None or budget.max_depth == 0 or budget.num_nodes == 0:
            return DraftTree.root(state.tokens[-1])
        base = cache.length  # committed rows; the tree's rows follow and are dropped at the end
        ids, scores = self._children(feature, torch.zeros(1), 1, state, budget)
        tokens, parents, all_scores = [ids], [torch.zeros(len(ids), dtype=torch.int64)], [scores]
        # Frontier: nodes expanded next, as indices into the pool (root = 0).
        frontier = torch.arange(1, len(ids) + 1)
        frontier_ids, frontier_scores = ids, scores
        features = feature.expand(len(ids), -1)
        ancestors = torch.zeros(len(ids), 0, dtype=torch.bool)  # of the frontier, among the tree's cache rows
        for depth in range(1, budget.max_depth):
            if float(frontier_scores.exp().sum()) < budget.min_gain:
                break
            n = len(frontier)
            mask = torch.cat(
                [torch.ones(n, base, dtype=torch.bool), ancestors, torch.eye(n, dtype=torch.bool)], 1
            )
            positions = torch.full((1, n), base + depth - 1)
            features = self._forward(frontier_ids, features, positions, cache, mask)
            ids, scores = self._children(features, frontier_scores, depth + 1, state, budget)
            first = 1 + sum(len(level) for level in tokens)
            tokens.append(ids)
            parents.append(frontier.repeat_interleave(len(ids) // n))
            all_scores.append(scores)
            if depth + 1 == budget.max_depth:
                break
            best = scores.topk(min(budget.top_k, len(scores))).indices.sort().values
            row = best // (len(ids) // n)  # which frontier node is the parent
            ancestors = mask[row, base:]
            frontier, frontier_ids, frontier_scores = best + first, ids[best], scores[best]
            features = features[row.to(features.device)]
        cache.keep(base)
        return _prune(state.tokens[-1], tokens, parents, all_scores, budget.num_nodes)

    def _cache(self, state: State) -> KVCache:
        if not isinstance(state.memory, KVCache):
            state.memory = KVCache(len(self.drafter.layers), state.max_length)
        return state.memory

    def _read(self, cache: KVCache, committed: Committed) -> Tensor | None:
        """Feed the accepted pairs; the last row's output is the root's draft feature, [1, h]."""
        cache.keep(min(cache.length, committed.start))
        count = len(committed.tokens)
        if count == 0:
            return None
        start = cache.length
        positions = torch.arange(start, start + count)
        mask = torch.arange(start + count)[None, :] <= positions[:, None]
        tokens = torch.tensor(committed.tokens)
        return self._forward(tokens, committed.features, positions[None], cache, mask)[-1:]

    def _forward(
        self, ids: Tensor, features: Tensor, positions: Tensor, cache: KVCache, mask: Tensor
    ) -> Tensor:
        """Draft features [n, h] of rows ids [n], features [n, h], positions [1, n], mask [n, length + n]."""
        device = features.device
        embeddings = self.target.embed(ids.to(self.target.device)).to(device)[None]
        output = self.drafter(embeddings, features[None], positions.to(device), cache, mask.to(device))
        return self.drafter.feedback(output)[0]

    def _children(
        self, features: Tensor, parent_scores: Tensor, depth: int, state: State, budget: Budget
    ) -> tuple[Tensor, Tensor]:
        """The top_k children of each node: ids and path scores, each [nodes * top_k] on the CPU.

        Coupled: the score of a child is log softmax(log q + T * noise), the posterior that it is the target's
        sample if target and drafter logits differ by a unit Gumbel; at T = 0 it is log q.
        """
        sampling = state.sampling
        if not self.coupled or sampling.temperature == 0:
            ids, log_probs = self.head.topk(features, budget.top_k, [state], parent_scores)
        else:
            ids, log_probs = self.head.topk(features, _POOL, [state], parent_scores)
            position = torch.tensor([len(state.tokens) + depth - 1], device=ids.device)
            noise = sampling.noise(position, state.sequence_id, ids)
            perturbed = (sampling.process(log_probs) + noise) * sampling.temperature
            log_probs, best = perturbed.log_softmax(-1).topk(budget.top_k, dim=-1)
            ids = ids.gather(-1, best)
        # Rounding may lift a certain child above 0, hence above its parent: the total order forbids that.
        scores = parent_scores[:, None] + log_probs.cpu().clamp(max=0)
        return ids.cpu().flatten(), scores.flatten()


def _prune(
    root: int, tokens: list[Tensor], parents: list[Tensor], scores: list[Tensor], num_nodes: int
) -> DraftTree:
    """Rerank the whole pool and keep the best nodes; indices are renumbered, parents first."""
    depth = torch.cat([torch.full((len(level),), d) for d, level in enumerate(tokens, 1)])
    pool_scores = torch.cat(scores)
    kept = best_nodes(pool_scores, depth, num_nodes)
    new_index = torch.zeros(len(pool_scores) + 1, dtype=torch.int64)
    new_index[kept + 1] = torch.arange(1, len(kept) + 1)
    return DraftTree(
        tokens=torch.cat([torch.tensor([root]), torch.cat(tokens)[kept]]),
        parents=torch.cat([torch.tensor([-1]), new_index[torch.cat(parents)[kept]]]),
        scores=torch.cat([torch.zeros(1), pool_scores[kept]]),
        num_forwards=len(tokens),
    )
