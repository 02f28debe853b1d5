"""Decoding with a drafter of features: what it predicts goes through an LM head of drafters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coral.decoding.state import State
from coral.drafters.feature.native_drafting import NativeDrafter, Seed
from coral.drafters.feature.network import Drafter
from coral.drafters.heads.full import FullHead
from coral.drafters.heads.store import Head
from coral.drafters.recurrent.grower import Grower
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize


class Feature(Grower):
    """A `DraftsByHead`; `native_drafting.py` grows its trees in one call where that can be."""

    layers = (-1,)

    def __init__(
        self, drafter: Drafter, target: Target, head: Head | None = None, coupled: bool = True
    ) -> None:
        super().__init__(drafter, target, coupled)
        self.head = head or FullHead(target)
        self._native = NativeDrafter.of(drafter, target)

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.head.num_bytes

    def topk(
        self, features: Tensor, k: int, states: Sequence[State], scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.head.topk(features, k, states, scores)

    def at_once(self, states: Sequence[State], tree_size: TreeSize) -> dict[State, DraftTree]:
        seeds = [seed for state in states if (seed := self._seed(state, tree_size))]
        if self._native is None or not seeds:
            return {}
        return dict(zip((seed.state for seed in seeds), self._native.grow(seeds), strict=True))

    def _seed(self, state: State, tree_size: TreeSize) -> Seed | None:
        """What the tree of a sequence grows from in one call with others; None where that cannot be done."""
        sampling = state.sampling
        pool = self.pool if self.coupled and sampling.temperature > 0 else 0
        if (
            self._native is None
            or not state.unread.parts
            or (pool and sampling.filters)
            or (table := self.head.table(state)) is None
        ):
            return None
        cache = self.cache(state, tree_size)
        return Seed(state, cache, table, tree_size.within(state.remaining), pool)
