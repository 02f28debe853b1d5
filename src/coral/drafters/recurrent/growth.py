"""A draft tree while a drafter grows it, level by level: EAGLE-2 (Li et al. 2024, arXiv 2406.16858).

n nodes of a level, k children each, h hidden size.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from coral.device import has_queue
from coral.tree import DraftTree, TreeSize, best_nodes


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
    """The tree of one sequence. On a GPU `min_gain` is left out: to look would be to wait; rows cost little.

    Args:
        root: the sequence's last token.
        rows: what the first draft step reads, the root last.

    Attributes:
        rows: what the next draft step reads; the last ones are the frontier, whose children it finds.
        scores: path scores [n] of the frontier, which is the root at first.
        wants_more: whether the next draft step is to be made.
        depth: levels below the root so far.
    """

    def __init__(self, root: int, rows: Rows, tree_size: TreeSize) -> None:
        self.root, self.rows, self.tree_size, self.depth = root, rows, tree_size, 0
        device = rows.ids.device
        self.wants_more = tree_size.max_depth > 0 and tree_size.num_nodes > 0
        self.scores = torch.zeros(1, device=device)
        self._frontier = torch.zeros(1, dtype=torch.int64, device=device)  # indices among all; the root is 0
        self._count = 1  # nodes so far
        self._levels: list[tuple[Tensor, Tensor, Tensor]] = []  # ids, scores and parents of the nodes

    def add(self, ids: Tensor, log_probs: Tensor, features: Tensor) -> None:
        """Add the frontier's children, if the tree size has a level for them.

        The best top_k of them are the next frontier, unless they are too unlikely to be reached. It is read
        with what their parents predicted.

        Args:
            ids, log_probs: [n, k]. features: draft features [n, h] that made them.
        """
        if not self.wants_more:
            return
        n, k = ids.shape
        ids = ids.flatten()
        # Rounding may lift a certain child above 0, hence above its parent: the total order forbids that.
        scores = (self.scores[:, None] + log_probs.clamp(max=0)).flatten()
        self._levels.append((ids, scores, self._frontier.repeat_interleave(k)))
        best = scores.topk(min(self.tree_size.top_k, n * k)).indices.sort().values
        parents, self.scores, self._frontier = best // k, scores[best], best + self._count
        self._count += n * k
        self.depth += 1
        self.wants_more = self.depth < self.tree_size.max_depth and (
            self.tree_size.min_gain == 0
            or has_queue(ids.device)
            or float(self.scores.max()) >= math.log(self.tree_size.min_gain)
        )
        if not self.wants_more:
            return
        allowed = torch.cat([self.rows.allowed[-n:][parents], _eye(len(best), ids.device)], 1)
        positions = (self.rows.positions[-1:] + 1).expand(len(best))
        self.rows = Rows(ids[best], features[parents], positions, allowed)

    def finish(self) -> DraftTree:
        """Rerank all nodes and keep the best; indices are renumbered, parents first."""
        if not self._levels:
            return DraftTree.root(self.root)
        ids, scores, parents = (torch.cat(parts) for parts in zip(*self._levels, strict=True))
        kept = best_nodes(scores, self.tree_size.num_nodes)
        if self.tree_size.min_gain and not has_queue(scores.device):
            kept = kept[scores[kept] >= math.log(self.tree_size.min_gain)]
        new_index = parents.new_zeros(self._count)
        new_index[kept + 1] = torch.arange(1, len(kept) + 1, device=kept.device)
        return DraftTree(
            tokens=torch.cat([ids.new_full((1,), self.root), ids[kept]]),
            parents=torch.cat([parents.new_full((1,), -1), new_index[parents[kept]]]),
            scores=torch.cat([scores.new_zeros(1), scores[kept]]),
            num_forwards=self.depth,
            levels=self.depth if has_queue(ids.device) else None,
        )


@cache
def _eye(n: int, device: torch.device) -> Tensor:
    return torch.eye(n, dtype=torch.bool, device=device)
