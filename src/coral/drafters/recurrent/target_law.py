"""What draft features are scored with, and the target's law on the same ids.

Shapes: c rows at a time, V vocabulary, D ids of it that the drafter scores, h hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class FrozenHead(NamedTuple):
    """The target's LM head, that both features are scored with; it does not learn."""

    weight: Tensor
    """[V,h]."""
    bias: Tensor | None
    """[V]."""
    certain: int
    """Rows, from the first, that stand for one id each; the others stand for more, see `candidates.py`."""


class OwnHead(NamedTuple):
    """What draft features are scored with in place of the target's head, for the first D of its ids."""

    weight: Tensor
    """[D,h]; it learns if it requires a gradient, and then the steps' losses must be summed."""
    bias: Tensor | None
    """[D]."""
    certain: int
    """As of `FrozenHead`."""
    renormalised: bool = False
    """The target's law on these ids is brought to 1, and rows whose likeliest token lies outside carry no
    loss."""


class TargetLaw(NamedTuple):
    """The target's distribution p of c rows on the drafter's ids, and its products with the drafter's head W,
    the same for all steps.
    """

    p: Tensor
    """[c,D]; if its buffer is that of q, it is gone once a step is scored."""
    total: Tensor
    """P, its sum: 1 unless mass lies outside, [c]."""
    covered: Tensor
    """That sum before p may have been brought to 1, [c]."""
    inside: Tensor
    """bool [c], whether the likeliest of all ids is one of the drafter's."""
    p_head: Tensor
    """p W, [c,h]."""
    p_bias: Tensor
    """p with the head's bias, [c]."""
    ids: Tensor
    """The K likeliest ids, [c,K]."""
    top: Tensor
    """Their probabilities, [c,K]."""
    mass: Tensor
    """P_K, the sum of these, [c]."""
    top_head: Tensor
    """The sum over these ids of p(x) W_x, [c,h]."""
    top_bias: Tensor
    """The same of the bias, [c]."""


def target_law(features: Tensor, head: FrozenHead, own: OwnHead, k: int, out: Tensor) -> TargetLaw:
    """The target's distribution after features [c,h], made in `out` [>= c,V], and its K likeliest ids."""
    p, scored = logits(features, head, out), len(own.weight)
    p, outside = torch.softmax(p, dim=-1, out=p).split([scored, len(head.weight) - scored], 1)
    total = covered = p.new_ones(len(p), dtype=torch.float32)
    inside = total > 0
    if outside.shape[1]:
        total = covered = p.sum(-1, dtype=torch.float32)
        inside = p.amax(-1) >= outside.amax(-1)
    if own.renormalised:
        p = p.div_(covered.clamp(min=1e-6)[:, None])
        total = torch.ones_like(covered)
    top, ids = p[:, : own.certain].topk(min(k, own.certain), dim=-1)
    top = top.float()
    p_head = times_head(p, own.weight)
    top_head = torch.bmm(top.unsqueeze(1), own.weight[ids].to(top.dtype)).squeeze(1)
    p_bias, top_bias = torch.zeros_like(total), torch.zeros_like(total)
    if own.bias is not None:
        p_bias = (p @ own.bias.to(p.dtype)).float()
        top_bias = (top * own.bias[ids].float()).sum(-1)
    return TargetLaw(p, total, covered, inside, p_head, p_bias, ids, top, top.sum(-1), top_head, top_bias)


def logits(rows: Tensor, head: FrozenHead | OwnHead, buffer: Tensor) -> Tensor:
    """Logits [c,V] in the head's dtype, written into `buffer`."""
    made = torch.mm(rows.to(head.weight.dtype), head.weight.t(), out=buffer[: len(rows)])
    return made if head.bias is None else made.add_(head.bias)


def times_head(probabilities: Tensor, head_weight: Tensor) -> Tensor:
    return torch.mm(probabilities.to(head_weight.dtype), head_weight).float()
