"""A draft tree while a drafter grows it, level by level: EAGLE-2 (Li et al. 2024, arXiv 2406.16858).

n nodes of a level, k children each, h hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coral.decoding.tree import Budget, DraftTree, best_nodes


class Rows(NamedTuple):
    """What a draft step reads of one sequence.

    ids [n] int64, features [n, h], positions [n] int64; allowed [n, length + n] bool over the `length` rows
    that the drafter's cache holds and these.
    """

    ids: Tensor
    features: Tensor
    positions: Tensor
    allowed: Tensor


class Growth:
    """The tree of one sequence.

    Args:
        root: the sequence's last token.
        length: rows in the drafter's cache; those of the tree follow, level by level.

    Attributes:
        wants_more: whether `add` is to be called with the children of the frontier.
        frontier_scores: path scores [n] of the nodes that are expanded next, the root at first.
        depth: levels below the root so far.
    """

    def __init__(self, root: int, length: int, budget: Budget, device: torch.device) -> None:
        self.root, self.length, self.budget, self.device, self.depth = root, length, budget, device, 0
        self.wants_more = budget.max_depth > 0 and budget.num_nodes > 0
        self.frontier = torch.zeros(1, dtype=torch.int64, device=device)  # indices among all nodes; root = 0
        self.frontier_scores = torch.zeros(1, device=device)
        self._tokens: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._reach = torch.zeros(
            1, 0, dtype=torch.bool, device=device
        )  # of the frontier, in the tree's rows

    def add(self, ids: Tensor, scores: Tensor, features: Tensor) -> None:
        """Add the frontier's children: ids and path scores [n, k], and the draft features [n, h] that made
        them. The best top_k of them are the next frontier, unless they are too unlikely to be reached.
        """
        n, k = ids.shape
        first = 1 + sum(map(len, self._tokens))
        ids, scores = ids.flatten(), scores.flatten()
        self._tokens.append(ids)
        self._parents.append(self.frontier.repeat_interleave(k))
        self._scores.append(scores)
        self.depth += 1
        best = scores.topk(min(self.budget.top_k, n * k)).indices.sort().values
        self.frontier, self.frontier_scores = best + first, scores[best]
        row = best // k
        self._next = ids[best], features[row], self._reach[row]
        self.wants_more = self.depth < self.budget.max_depth and (
            self.budget.min_gain == 0 or float(self.frontier_scores.exp().sum()) >= self.budget.min_gain
        )

    def rows(self) -> Rows:
        """The frontier as the next draft step reads it, each node with what its parent predicted."""
        ids, features, reach = self._next
        n = len(ids)
        self._reach = torch.cat([reach, torch.eye(n, dtype=torch.bool, device=self.device)], 1)
        committed = torch.ones(n, self.length, dtype=torch.bool, device=self.device)
        positions = torch.full((n,), self.length + self.depth - 1, device=self.device)
        return Rows(ids, features, positions, torch.cat([committed, self._reach], 1))

    def finish(self) -> DraftTree:
        """Rerank all nodes and keep the best; indices are renumbered, parents first."""
        if not self._tokens:
            return DraftTree.root(self.root)
        depth = torch.cat([torch.full((len(level),), d) for d, level in enumerate(self._tokens, 1)])
        tokens, parents, scores = (torch.cat(x).cpu() for x in (self._tokens, self._parents, self._scores))
        kept = best_nodes(scores, depth, self.budget.num_nodes)
        new_index = torch.zeros(len(scores) + 1, dtype=torch.int64)
        new_index[kept + 1] = torch.arange(1, len(kept) + 1)
        return DraftTree(
            tokens=torch.cat([torch.tensor([self.root]), tokens[kept]]),
            parents=torch.cat([torch.tensor([-1]), new_index[parents[kept]]]),
            scores=torch.cat([torch.zeros(1), scores[kept]]),
            num_forwards=self.depth,
        )
