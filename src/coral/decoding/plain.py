"""Plain decoding: a tree of one node, so that each target forward writes one token."""

from __future__ import annotations

from collections.abc import Sequence

from coral.decoding.state import State
from coral.tree import DraftTree, TreeSize


class Plain:
    """layers: states that a drafter will want later, see `Target.verify`."""

    def __init__(self, layers: tuple[int, ...] = ()) -> None:
        self.layers = layers

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        return [DraftTree.root(state.tokens[-1]) for state in states]
