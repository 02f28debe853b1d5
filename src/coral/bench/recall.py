"""Recall of a routed head: the part of the target's probability mass in the groups that it chose.

It is measured on a few prompts, apart from the timed texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from coral.decoding.cycle import generate
from coral.decoding.state import State
from coral.drafters.heads.routed import RoutedHead
from coral.drafters.kinds import DraftsByHead
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize


def recall_by_depth(
    target: Target, proposer: DraftsByHead, prompts: Sequence[list[int]], length: int, tree_size: TreeSize
) -> dict[str, Any] | None:
    """The part of the target's probability mass that lies in the groups which a routed head chose, its core
    included.

    At depth d it is the mass after the node of depth d - 1 on the accepted path, in the groups chosen for
    level d of that cycle's tree; the mean is over the cycles whose path reaches that node. The target's
    distribution is that of temperature 1; decoding is greedy.

    Returns:
        groups, active, core, recall and cycles (both by depth), or None where the head is not a routed one.
    """
    head = proposer.head
    if not isinstance(head, RoutedHead):
        return None
    sums = torch.zeros(tree_size.max_depth, 2, dtype=torch.float64)
    for prompt in prompts:
        state = State.begin(target, prompt, length, tree_size.num_nodes)
        for _ in generate(target, _Watcher(proposer, head, sums), [state], tree_size):
            pass
    reached = sums[sums[:, 1] > 0]
    return {
        "groups": len(head.ids),
        "active": head.active,
        "core": len(head.core),
        "recall": (reached[:, 0] / reached[:, 1]).tolist(),
        "cycles": reached[:, 1].long().tolist(),
    }


class _WatchedHead:
    """A routed head that remembers which groups it chose, level by level."""

    def __init__(self, head: RoutedHead) -> None:
        self.head, self.num_bytes, self.levels = head, head.num_bytes, list[Tensor]()

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        self.levels.append(self.head.choose(features, scores)[1])
        return self.head.topk(features, k, states, scores)

    def table(self, state: Any) -> None:
        return None


class _Watcher:
    """Drafts for one sequence. What is unread tells what the target's mass was along
    the path: row i is the feature of the node of depth i. `sums` [depths, 2] takes the mass and a count.
    """

    def __init__(self, proposer: DraftsByHead, head: RoutedHead, sums: Tensor) -> None:
        self.watched, self.sums = _WatchedHead(head), sums
        self.proposer = copy(proposer)
        self.proposer.head, self.layers = self.watched, proposer.layers

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        head, target = self.watched.head, self.proposer.target
        levels = self.watched.levels  # of the last cycle; none before the first
        for depth, (chosen, feature) in enumerate(zip(levels, states[0].unread.features, strict=False)):
            ids = head.active_ids(chosen)
            law = target.head(feature).float().softmax(-1)
            self.sums[depth] += torch.tensor([float(law[ids[ids >= 0]].sum()), 1.0], dtype=torch.float64)
        levels.clear()
        return self.proposer.propose(states, tree_size)
