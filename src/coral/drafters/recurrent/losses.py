"""Losses of draft features: their distance from the target's features, and that of the two distributions
over the vocabulary.

All sums run over the trained rows only, which are gathered first; the LM head then sees a few rows at a time,
so no (batch x length x V) tensor ever exists. Scores are in the head's dtype, sums over them in float32. The
head is frozen, which makes its part of the backward pass cheap: with W the head [V,h], f a draft feature, p
the target's and q the drafter's distribution,

    d/df ( -sum_x p(x) log q(x) )            = q W - p W
    d/df ( -sum_{x in K} p(x) log q(x) )     = P_K q W - sum_{x in K} p(x) W_x,   P_K = sum_{x in K} p(x).

Everything with p in it is computed once for all draft steps, and a step costs two products with the head and
one softmax in place.

Shapes: S draft steps, R trained rows, V vocabulary, h hidden size.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

Weight = Annotated[float, Field(ge=0, le=1e6)]


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; one recipe differs from another in these."""

    regression: Weight = 1.0
    """Weight of SmoothL1 (beta 1, mean over the hidden size) between draft feature and target feature."""
    divergence: Literal["kl", "tv", "nla", "lk"] = "kl"
    """How the drafter's distribution q is compared with the target's p over the whole vocabulary. kl: soft
    cross-entropy, which is the forward KL divergence up to a constant. The others follow the acceptance
    probability alpha = sum min(p, q) of sampled decoding: tv: 1 - alpha, nla: -log(alpha), lk: w * kl
    + (1 - w) * tv with w = exp(-3 alpha) held constant, so that kl leads while p and q hardly overlap.
    """
    divergence_weight: Weight = 0.1
    """Weight of the divergence."""
    top_k_weight: Weight = 0.0
    """Weight of the top-K loss: cross-entropy on the target's K likeliest tokens, not renormalised (HASS:
    1.0).
    """
    top_k: Annotated[int, Field(ge=1, le=2**20)] = 10
    """K of the top-K loss."""
    candidates: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Ids that draft steps are scored on, chosen for each batch and in part drawn (`candidates.py`):
    less to compute where the vocabulary is large; 0 takes all."""
    step_decay: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Draft step s counts with step_decay ** (s-1)."""
    aligned_top: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Leave a row of step s out unless each of the s-1 tokens before it was among the drafter's likeliest
    `aligned_top` when it was drafted, since decoding would not come there (GRIFFIN, arXiv 2502.11018: 3);
    0 keeps all rows.
    """


@dataclass(frozen=True)
class DraftLosses:
    """Sums over the trained rows of a batch, per draft step; `total` [S] carries the gradient, the rest does
    not.
    """

    total: Tensor
    regression: Tensor
    cross_entropy: Tensor
    top_k: Tensor
    correct: Tensor
    """Rows whose likeliest draft token is the target's likeliest."""
    rows: Tensor


class Wanted(NamedTuple):
    """What draft features are compared with, for the R trained rows in their order in the sequences."""

    features: Tensor
    """The target's features of the same tokens, [R,h]."""
    valid: Tensor
    """bool [S,R], False where a row carries no loss at that step."""
    tokens: Tensor
    """The token that each row is to predict, as a row of the head, int64 [R]."""
    before: Tensor
    """Where the row just before each stands among the R, int64 [R]; -1 if it is not trained."""


class FrozenHead(NamedTuple):
    """The LM head that both features are scored with; it does not learn."""

    weight: Tensor
    """[V,h]."""
    bias: Tensor | None
    """[V]."""
    certain: int
    """Rows, from the first, that stand for one id each; the others stand for more, see `candidates.py`."""


def draft_losses(
    drafts: Tensor, wanted: Wanted, head: FrozenHead, config: LossConfig, chunk: int | None = None
) -> DraftLosses:
    """Compare draft features [S,R,h] with what is wanted of them.

    Args:
        chunk: rows that meet the LM head at a time; None: as `TrainConfig.head_chunk` says.
    """
    chunk = chunk or rows_at_a_time(len(head.weight))
    decay = torch.tensor([config.step_decay**step for step in range(len(drafts))], device=drafts.device)
    wanted = wanted._replace(features=wanted.features.to(drafts.dtype))
    valid = kept = wanted.valid
    zero = torch.zeros(len(drafts), device=drafts.device)
    total, cross_entropy, top_k, correct = zero, zero, zero, zero
    if config.divergence_weight or config.top_k_weight or config.aligned_top:
        total, cross_entropy, top_k, correct, kept = _HeadLoss.apply(drafts, wanted, head, config, chunk)
    goals = wanted.features.expand_as(drafts)
    distance = smooth_l1_loss(drafts, goals, reduction="none").mean(-1)  # [S,R]
    total = total + config.regression * (distance * kept).sum(1)
    regression = (distance.detach() * valid).sum(1)
    return DraftLosses(total * decay, regression, cross_entropy, top_k, correct, valid.sum(1))


def rows_at_a_time(vocabulary: int) -> int:
    """Rows whose scores fill 64 MB in float32, and no fewer than 256, below which products get slow."""
    return max(256, 2**24 // vocabulary)


class _HeadLoss(torch.autograd.Function):
    """Weighted divergence and top-K loss, summed per step; gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, drafts: Tensor, wanted: Wanted, head: FrozenHead, config: LossConfig, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        steps, rows, _ = drafts.shape
        valid, tokens, certain = wanted.valid, wanted.tokens, head.certain
        gradient = torch.empty(drafts.shape, dtype=torch.float32, device=drafts.device)  # [S,R,h]
        sums = torch.zeros(4, steps, device=drafts.device)  # divergence, cross-entropy, top-K, correct
        kept, hits = valid.clone(), torch.ones_like(valid)
        buffer = head.weight.new_empty(min(chunk, max(rows, 1)), head.weight.shape[0])
        own = buffer if config.divergence == "kl" else torch.empty_like(buffer)  # p is needed beside q
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            law = _target_law(wanted.features[part], head, config, own)
            for step in range(steps):
                q = _logits(drafts[step, part], head, buffer)
                highest = q.amax(-1)  # several times faster on CPU than the index of the maximum
                likeliest = highest if certain == q.shape[1] else q[:, :certain].amax(-1)
                correct = q.gather(1, law.ids[:, :1]).squeeze(1) >= likeliest
                if config.aligned_top:
                    above = q > q.gather(1, tokens[part, None])
                    hits[step, part] = above.sum(-1) < config.aligned_top
                    _leave_out(kept, hits, wanted, step, part)
                q = torch.softmax(q, dim=-1, out=q)
                normaliser = highest.float() - q.amax(-1).float().log()  # log-sum-exp of the logits
                losses, slope = _compare(drafts[step, part], q, normaliser, law, head, config)
                sums[:3, step] += (losses * kept[step, part]).sum(1)
                sums[3, step] += (correct & valid[step, part]).sum()
                gradient[step, part] = slope * kept[step, part, None]
        ctx.save_for_backward(gradient)
        ctx.dtype = drafts.dtype
        ctx.mark_non_differentiable(kept)
        total = config.divergence_weight * sums[0] + config.top_k_weight * sums[2]
        return total, sums[1], sums[2], sums[3], kept

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None, None]).to(ctx.dtype), None, None, None, None


class _TargetLaw(NamedTuple):
    """The target's distribution p of c rows, and its products with the head W, the same for all steps."""

    p: Tensor
    """[c,V]; kl: it is in the buffer of q, and gone once a step is scored."""
    p_head: Tensor
    """p W, [c,h]."""
    p_bias: Tensor
    """p with the head's bias, [c]."""
    ids: Tensor
    """The K likeliest ids, [c,K]."""
    mass: Tensor
    """P_K, their probability, [c]."""
    top_head: Tensor
    """The sum over these ids of p(x) W_x, [c,h]."""
    top_bias: Tensor
    """The same of the bias, [c]."""


def _target_law(features: Tensor, head: FrozenHead, config: LossConfig, out: Tensor) -> _TargetLaw:
    """The target's distribution after features [c,h], made in `out` [>= c,V]."""
    p = _logits(features, head, out)
    p = torch.softmax(p, dim=-1, out=p)
    k = min(config.top_k if config.top_k_weight else 1, head.certain)
    top, ids = p[:, : head.certain].topk(k, dim=-1)
    top = top.float()
    mass = top.sum(-1)
    p_head = _times_head(p, head.weight)
    top_head = torch.bmm(top.unsqueeze(1), head.weight[ids].to(top.dtype)).squeeze(1)
    p_bias, top_bias = torch.zeros_like(mass), torch.zeros_like(mass)
    if head.bias is not None:
        p_bias = (p @ head.bias.to(p.dtype)).float()
        top_bias = (top * head.bias[ids].float()).sum(-1)
    return _TargetLaw(p, p_head, p_bias, ids, mass, top_head, top_bias)


def _leave_out(kept: Tensor, hits: Tensor, wanted: Wanted, step: int, part: slice) -> None:
    """Update `kept` [S,R] for `aligned_top`, and from it `hits` [S,R]: all tokens up to this were likely.

    The row before each was settled earlier: rows come in order.
    """
    if step:
        before = wanted.before[part]
        kept[step, part] &= (before < 0) | hits[step - 1, before]
    hits[step, part] &= kept[step, part] | ~wanted.valid[step, part]


def _compare(
    draft: Tensor, q: Tensor, normaliser: Tensor, law: _TargetLaw, head: FrozenHead, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Divergence, cross-entropy and top-K loss of rows [3,c], and the slope of their weighted sum [c,h].

    Args:
        draft: draft features [c,h] whose distribution is q [c,V], which is used up, and whose logits have the
            log-sum-exp `normaliser` [c].
    """
    weight, k, mass = config.divergence_weight, config.top_k_weight, law.mass
    cross_entropy = normaliser - (draft * law.p_head).sum(-1) - law.p_bias
    top_k = mass * normaliser - (draft * law.top_head).sum(-1) - law.top_bias
    # Slope in the logits: weight * (kl * (q - p) + tv * slope of 1 - alpha) + k * (P_K q - top).
    if config.divergence == "kl":
        divergence, kl = cross_entropy, torch.ones_like(mass)
        slope = (weight + k * mass)[:, None] * _times_head(q, head.weight)
    else:
        alpha = torch.minimum(law.p, q).sum(-1, dtype=torch.float32)
        divergence, kl, tv = _overlap_loss(config.divergence, cross_entropy, alpha)
        inside = q * (law.p > q)
        outer = weight * (kl + tv * inside.sum(-1, dtype=torch.float32)) + k * mass
        q = q.mul_(outer[:, None]).sub_(inside.mul_((weight * tv)[:, None]))
        slope = _times_head(q, head.weight)
    slope -= (weight * kl)[:, None] * law.p_head + k * law.top_head
    return torch.stack([divergence, cross_entropy, top_k]), slope


def _overlap_loss(kind: str, cross_entropy: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row, and how much of its slope is that of the forward KL and that of 1 - alpha."""
    alpha = alpha.clamp(min=1e-5)
    if kind == "tv":
        return 1 - alpha, torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "nla":
        return -alpha.log(), torch.zeros_like(alpha), 1 / alpha
    kl = torch.exp(-3 * alpha)  # eta = 3
    return kl * cross_entropy + (1 - kl) * (1 - alpha), kl, 1 - kl


def _logits(rows: Tensor, head: FrozenHead, buffer: Tensor) -> Tensor:
    """Logits [c,V] in the head's dtype, written into `buffer`."""
    logits = torch.mm(rows.to(head.weight.dtype), head.weight.t(), out=buffer[: len(rows)])
    return logits if head.bias is None else logits.add_(head.bias)


def _times_head(probabilities: Tensor, head_weight: Tensor) -> Tensor:
    return torch.mm(probabilities.to(head_weight.dtype), head_weight).float()
