"""Decoding with a drafter of fused states, which has an LM head of its own.

Trees are grown level by level. Native code would grow them in `at_once`, as `feature/native_drafting.py`
does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coral.decoding.state import State
from coral.drafters.eagle3.fused_network import FusedDrafter
from coral.drafters.recurrent.grower import Grower
from coral.target.target import Target


class Fused(Grower):
    """See `Grower`."""

    def __init__(self, drafter: FusedDrafter, target: Target, coupled: bool = True) -> None:
        super().__init__(drafter, target, coupled)
        self.layers, self._ids = drafter.config.layers, drafter.ids

    def read(self, states: Tensor) -> Tensor:
        return self.drafter.fuse(states)

    def topk(
        self, features: Tensor, k: int, states: Sequence[State], scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = self.drafter.logits(features).float()
        values, best = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return self._ids[best], values - logits.logsumexp(-1, keepdim=True)
