"""The target's own LM head, all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from coral.drafters.heads.rows import Table
from coral.drafters.heads.stored import Stored
from coral.target.target import Target


class FullHead:
    """Scores every id, so it reads every row."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.num_bytes = target.head_weight.numel() * target.head_weight.element_size()

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = self.log_probs(features)
        values, ids = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
        return ids, values

    def table(self, state: Any) -> Table:
        bias = self.target.head_bias
        return Table(self.target.head_weight, None if bias is None else bias.float(), fixed=True)

    def log_probs(self, features: Tensor) -> Tensor:
        """[N, V] float32."""
        return self.target.head(features).float().log_softmax(-1)


def build(target: Target, stored: Stored) -> FullHead:
    """Made from the target alone."""
    return FullHead(target)
