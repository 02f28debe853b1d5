"""The LM head at a lower rank: two thin matrices, whose cost does not depend on the nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coral.drafters.heads.rows import linear
from coral.drafters.heads.stored import Stored
from coral.drafters.kinds import num_bytes
from coral.target.target import Target


class LowRankHead:
    """The LM head as a product of two thin matrices (SlimSpec, arXiv 2605.10453), with the likeliest ids
    scored again by the real rows (SpecVocab, arXiv 2602.13836).

    Args:
        up, down: [V, r] and [r, h].
        rescored: ids of each node that meet their real row; 0: none.
    """

    def __init__(self, target: Target, up: Tensor, down: Tensor, rescored: int = 0) -> None:
        weight = target.head_weight
        self.target, self.rescored = target, rescored
        up, down = (part.to(weight.device, weight.dtype) for part in (up, down))
        self.factors = nn.Sequential(linear(down, None), linear(up, target.head_bias))
        self.num_bytes = num_bytes(self.factors)

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        logits, ids = self._scores(features, k)
        values, best = logits.gather(1, ids).topk(min(k, ids.shape[1]), dim=-1)
        return ids.gather(1, best), values - logits.logsumexp(-1, keepdim=True)

    def table(self, state: Any) -> None:
        return None

    def log_probs(self, features: Tensor) -> Tensor:
        """[N, V] float32; as in `topk`, no id comes before those that met their real row."""
        logits, ids = self._scores(features, 1)
        mass = logits.logsumexp(-1, keepdim=True)
        if self.rescored:
            real = logits.gather(1, ids)
            logits = logits.clamp(max=real.amin(1, keepdim=True)).scatter(1, ids, real)
        return logits - mass

    def _scores(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores of all ids [N, V], and the ids among which the best are to be found [N, >= k]."""
        logits = self.factors(features).float()
        ids = logits.topk(min(max(k, self.rescored), logits.shape[-1]), dim=-1).indices
        if self.rescored:
            real = torch.bmm(self.target.head_weight[ids], features.to(self.target.dtype).unsqueeze(-1))
            scores = real.squeeze(-1).float()
            if self.target.head_bias is not None:
                scores += self.target.head_bias[ids]
            logits.scatter_(1, ids, scores)
        return logits, ids


def build(target: Target, stored: Stored) -> LowRankHead:
    """Of the tensors `up` [V, r] and `down` [r, h] and the number `rescored`; raises ValueError where they
    are not this target's.
    """
    shape = target.vocab_size, target.hidden_size
    up, down = stored.tensors["up"], stored.tensors["down"]
    if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
        raise ValueError(f"its factors are not for a head of {shape[0]} x {shape[1]}")
    return LowRankHead(target, up, down, stored.number("rescored", 0, shape[0]))


def factorise(
    head_weight: Tensor, second_moment: Tensor, rank: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The factors up [V, r], down [r, h] float32 that change the scores of draft features least.

    They minimise E || diag(sqrt(weights)) (W - up down) f ||^2 over draft features f: a singular value
    decomposition of W whitened by the features' second moment. The mean row takes one of the ranks, since it
    moves all scores alike and its size would hide what tells the ids apart.

    Args:
        head_weight: W [V, h]. second_moment: E[f f^T], [h, h]. weights: importance of each id [V].
    """
    w = head_weight.float()
    weights = torch.ones(len(w)) if weights is None else weights.float()
    weights = (weights / weights.sum()).to(w.device)
    mean = weights @ w
    w = w - mean
    values, vectors = torch.linalg.eigh(second_moment.double())
    root = values.clamp(min=values.max() * 1e-8).sqrt()
    half = (vectors * root).to(w.dtype)  # whitening: M = half half^T
    whitened = w @ half  # [V, h]
    gram = (whitened * weights[:, None]).T @ whitened
    basis = torch.linalg.eigh(gram.double())[1][:, len(gram) - rank + 1 :].to(w.dtype)  # [h, r - 1]
    up, down = whitened @ basis, basis.T @ (vectors / root).T.to(w.dtype)
    return torch.cat([up, torch.ones_like(up[:, :1])], 1), torch.cat([down, mean[None]])
