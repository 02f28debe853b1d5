"""Heads that score every node with less than the target's LM head: fewer ids, or a lower rank.

Both are cheap for any number of nodes, since what they multiply does not depend on the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coral.drafters.feature.network import num_bytes
from coral.target.target import Target


class Table(NamedTuple):
    """A head that is linear: rows [K, h] float32 or bfloat16, bias [K] float32 or None, and the ids int64 [K]
    they score (None: 0 to K - 1).

    fixed: the rows are the same tensor every time, and stay as they are.
    """

    rows: Tensor
    bias: Tensor | None = None
    ids: Tensor | None = None
    fixed: bool = False


class StaticHead:
    """The LM head's rows of the ids that the target writes most (FR-Spec, arXiv 2502.14856; VocabTrim,
    arXiv 2506.22694).

    Args:
        ids: int64 [K], the ids that may be drafted.
    """

    def __init__(self, target: Target, ids: Tensor) -> None:
        self.ids = ids.to(target.head_weight.device)
        self.rows = rows_of(target, self.ids)
        self.vocab_size = target.vocab_size
        self.num_bytes = num_bytes(self.rows)

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.rows(features).float()
        values, best = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return self.ids[best], values - logits.logsumexp(-1, keepdim=True)

    def table(self, state: Any) -> Table:
        return self._table

    @cached_property
    def _table(self) -> Table:
        bias = self.rows.bias
        return Table(self.rows.weight.detach(), None if bias is None else bias.float(), self.ids, fixed=True)

    def log_probs(self, features: Tensor) -> Tensor:
        """[N, V] float32; ids that are left out have -inf."""
        dense = torch.full((len(features), self.vocab_size), float("-inf"), device=features.device)
        dense[:, self.ids] = self.rows(features).float().log_softmax(-1)
        return dense


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
        self.factors = nn.Sequential(_linear(down, None), _linear(up, target.head_bias))
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


def rows_of(target: Target, ids: Tensor) -> nn.Linear:
    """The LM head's rows of some ids [K], as a layer that scores them alone."""
    bias = None if target.head_bias is None else target.head_bias[ids]
    return _linear(target.head_weight[ids], bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer
