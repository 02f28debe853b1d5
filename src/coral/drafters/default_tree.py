"""The draft tree of a drafter that was not tuned: of some sizes the one that is fastest on this machine."""

from __future__ import annotations

from coral.decoding import row_costs
from coral.decoding.row_costs import Promise, RowCosts
from coral.device import has_queue
from coral.target.target import Target
from coral.tree import CPU_DEFAULT, DEFAULT, TreeSize

# With the tokens a cycle, nodes and levels that a drafter of little training had in general answers.
_SIZES = (
    (TreeSize(1, 2, 1, 0.2), 1.458, 0.86, 1.83),
    (TreeSize(1, 3, 3, 0.1), 1.701, 1.74, 2.45),
    (CPU_DEFAULT, 1.873, 2.84, 3.25),
    (TreeSize(2, 6, 7, 0.05), 1.960, 4.09, 3.77),
    (TreeSize(3, 6, 10, 0.03), 2.142, 6.82, 4.16),
    (TreeSize(4, 6, 15, 0.02), 2.264, 10.6, 4.33),
    (TreeSize(6, 8, 23, 0.02), 2.429, 13.9, 4.60),
    (TreeSize(8, 8, 31, 0.01), 2.528, 23.7, 4.96),
    (TreeSize(10, 8, 47, 0.01), 2.594, 27.7, 4.92),
)


def default_tree(target: Target) -> TreeSize:
    """On a GPU, where rows cost little and growth does not stop early, `tree.DEFAULT`; where costs cannot be
    measured, `tree.CPU_DEFAULT`.
    """
    if has_queue(target.device):
        return DEFAULT
    costs = row_costs.of(target)
    return CPU_DEFAULT if costs is row_costs.ASSUMED else fastest(costs)


def fastest(costs: RowCosts) -> TreeSize:
    """The fastest size for one text."""

    def speed(size: tuple[TreeSize, float, float, float]) -> float:
        tree, tokens, nodes, levels = size
        return costs.speed(1, Promise(tokens, nodes, [1.0] * int(levels) + [levels % 1]), tree.top_k)

    return max(_SIZES, key=speed)[0]
