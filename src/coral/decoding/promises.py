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
_DEPTH = 8  # levels that are told apart

# min_gain: nodes, the tokens that they promise, and levels that are drafted.
_FIRST = {
    0.05: (4.1, 0.96, 3.4),
    0.1: (2.8, 0.87, 3.1),
    0.15: (2.1, 0.77, 2.9),
    0.2: (1.6, 0.69, 2.7),
    0.3: (0.98, 0.57, 2.3),
    0.4: (0.67, 0.45, 2.1),
    0.5: (0.48, 0.38, 1.8),
    0.6: (0.38, 0.33, 1.6),
    0.7: (0.29, 0.26, 1.4),
    0.8: (0.20, 0.19, 1.3),
    0.9: (0.13, 0.13, 1.2),
}


class Promises:
    """Means over texts of what a tree is and promises, for each `min_gain` that it might have.

    Attributes:
        kept: of the tokens that trees promise, those that are accepted.
    """

    def __init__(self) -> None:
        self.kept = 1.0
        self._promised = self._accepted = 1.0
        self._means = {gain: _spread(*first) for gain, first in _FIRST.items()}

    def note(self, tree: DraftTree, accepted: int, min_gain: float) -> None:
        """Learn from a tree that grew with this `min_gain`, of which so many nodes were accepted."""
        _, parents, scores = tree.lists
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        nodes = [*zip(depths, map(math.exp, scores), strict=True)][1:]
        self._promised += _WEIGHT * (sum(chance for _, chance in nodes) - self._promised)
        self._accepted += _WEIGHT * (accepted - self._accepted)
        self.kept = min(1.0, self._accepted / self._promised)
        for gain, means in self._means.items():
            if gain >= min_gain:
                for i, found in enumerate(_with(nodes, gain)):
                    means[i] += _WEIGHT * (found - means[i])

    def of(self, min_gain: float) -> Promise:
        nodes, promised, *levels = self._means[min_gain]
        return Promise(1 + self.kept * promised, nodes, levels)

    def best(self, costs: RowCosts, live: int, tree_size: TreeSize) -> tuple[TreeSize, bool]:
        """The fastest tree size for so many texts whose `min_gain` is no lower than this one's, and whether
        it is faster than plain steps.
        """
        gains = [gain for gain in self._means if gain >= tree_size.min_gain] or [max(self._means)]
        speeds = {gain: costs.speed(live, self.of(gain), tree_size.top_k) for gain in gains}
        gain = max(gains, key=speeds.__getitem__)
        pays = speeds[gain] > costs.speed(live, PLAIN, tree_size.top_k)
        # The first of them stands for the tree size as it is.
        return (tree_size if gain == gains[0] else replace(tree_size, min_gain=gain)), pays


def _with(nodes: Sequence[tuple[int, float]], gain: float) -> list[float]:
    """What a `min_gain` leaves of nodes, which are depths and chances: how many, the tokens they promise, and
    of each level whether it would have been drafted.
    """
    kept = [(depth, chance) for depth, chance in nodes if chance >= gain]
    grown = [1.0, *[0.0] * (_DEPTH - 1)]  # the chance of what each level grows from
    for depth, chance in kept:
        if depth < _DEPTH:
            grown[depth] += chance
    drafted = next((level for level, chance in enumerate(grown) if chance < gain), _DEPTH)
    promised = sum(chance for _, chance in kept)
    return [len(kept), promised, *(float(level < drafted) for level in range(_DEPTH))]


def _spread(nodes: float, promised: float, levels: float) -> list[float]:
    """The same in the mean, of so many levels: as if each were as likely to be the last."""
    return [nodes, promised, *((1 - 1 / levels) ** depth for depth in range(_DEPTH))]
