"""Plain decoding: a tree of one node, so that each target forward writes one token."""

from __future__ import annotations

from collections.abc import Sequence

from coral.decoding.cycle import Proposer
from coral.decoding.state import State
from coral.tree import DraftTree, TreeSize


class Plain:
    """layers: states that a drafter will want later, see `Target.verify`."""

    def __init__(self, layers: tuple[int, ...] = ()) -> None:
        self.layers = layers

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        return [DraftTree.root(state.tokens[-1]) for state in states]


class Willing:
    """Lets `proposer` draft for the texts that want it; the others take plain steps beside them."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer, self.layers = proposer, proposer.layers

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        willing = [state for state in states if state.drafts]
        trees = iter(self.proposer.propose(willing, tree_size) if willing else ())
        return [next(trees) if state.drafts else DraftTree.root(state.tokens[-1]) for state in states]
