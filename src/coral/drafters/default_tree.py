"""The draft tree of a drafter that was not tuned: of some sizes the one that is fastest on this machine."""

from __future__ import annotations

from coral.decoding import row_costs
from coral.decoding.row_costs import Promise, RowCosts
from coral.device import has_queue
from coral.target.target import Target
from coral.tree import CPU_DEFAULT, DEFAULT, TreeSize

# With the tokens a cycle, and nodes at each depth, of a drafter of little training in general answers.
_SIZES = (
    (TreeSize(1, 1, 1), 1.49, (0.99,)),
    (TreeSize(1, 3, 3, 0.1), 1.70, (0.97, 0.58, 0.32)),
    (CPU_DEFAULT, 1.87, (1.54, 0.91, 0.48, 0.19, 0.06, 0.02)),
    (TreeSize(2, 6, 7, 0.05), 1.96, (1.77, 1.46, 0.83, 0.32, 0.11, 0.02)),
    (TreeSize(3, 6, 10, 0.03), 2.14, (2.51, 2.52, 1.42, 0.62, 0.24, 0.07)),
    (TreeSize(4, 6, 15, 0.02), 2.26, (3.31, 3.91, 2.32, 1.14, 0.49, 0.17)),
    (TreeSize(6, 8, 23, 0.02), 2.43, (4.49, 4.74, 2.86, 1.57, 0.76, 0.33, 0.14, 0.06)),
    (TreeSize(8, 8, 31, 0.01), 2.53, (6.05, 8.36, 5.28, 2.83, 1.30, 0.62, 0.25, 0.12)),
    (TreeSize(10, 8, 47, 0.01), 2.59, (7.20, 9.51, 6.17, 3.62, 1.93, 1.01, 0.50, 0.24)),
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
    return max(_SIZES, key=lambda size: costs.speed(1, Promise(*size[1:])))[0]
