"""What draft trees of any least probability would bring, learnt from those of the last cycles.

A batch verifies the rows of all texts, so each text's tree is to hold only nodes that are worth their row:
those that are likely enough. Every tree tells what it would have been with a higher `min_gain`; what a lower
one would bring stays as it was found last, or as a drafter of little training has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from coral.decoding.row_costs import PLAIN, Promise, RowCosts
from coral.tree import DraftTree, TreeSize

_WEIGHT = 1 / 64  # of a tree in the means
_MARGIN = 1.05  # that costs may be wrong by, before a batch drafts
_DEPTH = 8  # that are told apart

# By min_gain, nodes at each depth.
_FIRST = {
    0.05: (1.77, 1.46, 0.83, 0.32, 0.11, 0.02),
    0.1: (1.54, 0.91, 0.48, 0.20, 0.06, 0.02),
    0.15: (1.28, 0.62, 0.27, 0.10, 0.04, 0.02),
    0.2: (1.06, 0.47, 0.19, 0.06, 0.02, 0.01),
    0.3: (0.71, 0.28, 0.10, 0.04, 0.01),
    0.4: (0.52, 0.18, 0.06, 0.02, 0.01),
    0.5: (0.41, 0.13, 0.05, 0.01),
    0.6: (0.34, 0.10, 0.03),
    0.7: (0.28, 0.06, 0.01),
    0.8: (0.20, 0.05, 0.01),
    0.9: (0.13, 0.02),
}
_PROMISED = (1.11, 1.02, 0.91, 0.82, 0.66, 0.53, 0.45, 0.38, 0.30, 0.23, 0.15)  # tokens, by min_gain


class Promises:
    """Means over texts of what a tree is and promises, for each `min_gain` that it might have.

    Attributes:
        kept: of the tokens that trees promise, those that are accepted.
        noted: how many trees were learnt from.
    """

    def __init__(self) -> None:
        self.kept, self.noted = 1.0, 0
        self._promised = self._accepted = 1.0
        self._means = {
            gain: [promised, *widths, *[0.0] * (_DEPTH - len(widths))]
            for promised, (gain, widths) in zip(_PROMISED, _FIRST.items(), strict=True)
        }

    def note(self, tree: DraftTree, accepted: int, min_gain: float) -> None:
        """Learn from a tree that grew with this `min_gain`, of which so many nodes were accepted."""
        depths, chances = tree.depth.tolist(), [*map(math.exp, tree.lists[2])]
        nodes = [*zip(depths, chances, strict=True)][1:]
        self.noted += 1
        self._promised += _WEIGHT * (sum(chance for _, chance in nodes) - self._promised)
        self._accepted += _WEIGHT * (accepted - self._accepted)
        self.kept = min(1.0, self._accepted / self._promised)
        for gain, means in self._means.items():
            if gain >= min_gain:
                for i, found in enumerate(_with(nodes, gain)):
                    means[i] += _WEIGHT * (found - means[i])

    def of(self, min_gain: float) -> Promise:
        promised, *widths = self._means[min_gain]
        return Promise(1 + self.kept * promised, widths)

    def best(self, costs: RowCosts, live: int, tree_size: TreeSize) -> tuple[TreeSize, bool]:
        """The fastest tree size for so many texts whose `min_gain` is no lower than this one's, and whether
        it is faster than plain steps.
        """
        gains = [gain for gain in self._means if gain >= tree_size.min_gain] or [max(self._means)]
        speeds = {gain: costs.speed(live, self.of(gain)) for gain in gains}
        gain = max(gains, key=speeds.__getitem__)
        pays = speeds[gain] > _MARGIN * costs.speed(live, PLAIN)
        # The first of them stands for the tree size as it is.
        return (tree_size if gain == gains[0] else replace(tree_size, min_gain=gain)), pays


def _with(nodes: Sequence[tuple[int, float]], gain: float) -> list[float]:
    """The tokens that nodes (depths, chances) promise with a `min_gain`, and how many are at each depth."""
    promised, widths = 0.0, [0.0] * _DEPTH
    for depth, chance in nodes:
        if chance >= gain:
            promised += chance
            widths[min(depth, _DEPTH) - 1] += 1
    return [promised, *widths]
