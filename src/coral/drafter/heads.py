"""Heads turn draft features into draft tokens. A head can only change speed, never the output.

`topk(features [N, h], k, states) -> (ids [N, k] int64, log_probs [N, k] float32)`, likeliest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from coral.target import Target


class Head(Protocol):
    def topk(self, features: Tensor, k: int, states: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The k likeliest ids of each row and their log-probabilities."""
        ...


class FullHead:
    """The target's own LM head, all rows."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def topk(self, features: Tensor, k: int, states: Sequence[Any]) -> tuple[Tensor, Tensor]:
        logits = self.target.head(features).float()
        values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return ids, values - logits.logsumexp(-1, keepdim=True)

    def log_probs(self, features: Tensor) -> Tensor:
        """[N, V] float32, for tests."""
        return self.target.head(features).float().log_softmax(-1)
