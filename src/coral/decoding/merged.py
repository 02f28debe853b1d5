"""One tree from two sources: text that occurred before, and what a drafter makes of the features.

Lookup costs nothing and drafts far ahead when the text repeats itself; a drafter knows how to go on when it
does not. Both say how likely their nodes are, so the likeliest of all make the tree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from coral.decoding.cycle import Proposer
from coral.decoding.state import State
from coral.device import CPU
from coral.tree import DraftTree, TreeSize, merge


class Merged:
    """Lookup drafts a chain, a drafter its tree; the likeliest nodes of both are verified.

    Where lookup alone promises `sure` tokens, the sum of its nodes' probabilities, the drafter is left out
    and reads later what it missed.
    """

    def __init__(self, drafter: Proposer, lookup: Proposer, sure: float = 4.0) -> None:
        self.drafter, self.lookup, self.sure, self.layers = drafter, lookup, sure, drafter.layers

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        longest = replace(tree_size, top_k=1, max_depth=tree_size.num_nodes)
        trees = self.lookup.propose(states, longest)
        unsure = [i for i, tree in enumerate(trees) if sum(map(math.exp, tree.lists[2][1:])) < self.sure]
        drafted = self.drafter.propose([states[i] for i in unsure], tree_size) if unsure else []
        for i, tree in zip(unsure, drafted, strict=True):
            trees[i] = merge([trees[i], tree.to(CPU)], tree_size.num_nodes) if len(trees[i]) > 1 else tree
        return trees
