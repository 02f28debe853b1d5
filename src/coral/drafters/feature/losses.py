"""What a draft feature is compared with: the target's feature, and the target's distribution over the
vocabulary.

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
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from coral.drafters.feature.unroll import offsets_in_document

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
    """Weight of that."""
    top_k_weight: Weight = 0.0
    """Weight of the top-K loss: cross-entropy on the target's K likeliest tokens, not renormalised (HASS:
    1.0).
    """
    top_k: Annotated[int, Field(ge=1, le=2**20)] = 10
    """K of the top-K loss."""
    candidates: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Ids that draft steps are scored on, chosen for each batch and in part drawn (`training/candidates.py`):
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


def trained_rows(loss_mask: Tensor, document_starts: Tensor | None, steps: int) -> Tensor:
    """Which rows carry a loss at each step, bool [S,B,L].

    Row t predicts the feature of token t+1, from which the LM head predicts token t+2. So row t is trained if
    the target is to write token t+2 (`loss_mask` [B,L], not shifted) and that token lies in the row's
    document; at step s the first s-1 rows of a document stand for no state of decoding and are left out.
    """
    offsets = offsets_in_document(document_starts, loss_mask.shape).to(loss_mask.device)
    trained = torch.zeros_like(loss_mask, dtype=torch.bool)
    trained[:, :-2] = loss_mask[:, 2:].bool() & (offsets[:, 2:] == offsets[:, :-2] + 2)
    return torch.stack([trained & (offsets >= step) for step in range(steps)])


def draft_losses(
    drafts: Tensor,
    features: Tensor,
    valid: Tensor,
    tokens: Tensor,
    before: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    config: LossConfig,
    chunk: int | None = None,
    certain: int | None = None,
) -> DraftLosses:
    """Compare draft features [S,R,h] with the target's features [R,h] of the same tokens.

    Args:
        valid: bool [S,R], False where a row carries no loss at that step.
        tokens: the token that each row is to predict, int64 [R].
        before: where the row just before each stands among the R, int64 [R]; -1 if it is not trained. Rows
            come in their order in the sequence.
        head_weight: the target's frozen LM head [V,h]; head_bias: [V] or None.
        chunk: rows that meet the LM head at a time; None: as `TrainConfig.head_chunk` says.
        certain: rows of the head, from the first, that stand for one id each; None: all.
    """
    chunk = chunk or rows_at_a_time(len(head_weight))
    certain = len(head_weight) if certain is None else certain
    decay = torch.tensor([config.step_decay**step for step in range(len(drafts))], device=drafts.device)
    features, kept = features.to(drafts.dtype), valid
    zero = torch.zeros(len(drafts), device=drafts.device)
    total, cross_entropy, top_k, correct = zero, zero, zero, zero
    if config.divergence_weight or config.top_k_weight or config.aligned_top:
        total, cross_entropy, top_k, correct, kept = _HeadLoss.apply(
            drafts, features, valid, tokens, before, head_weight, head_bias, config, chunk, certain
        )
    distance = smooth_l1_loss(drafts, features.expand_as(drafts), reduction="none").mean(-1)  # [S,R]
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
        ctx: Any,
        drafts: Tensor,
        features: Tensor,
        valid: Tensor,
        tokens: Tensor,
        before: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        config: LossConfig,
        chunk: int,
        certain: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        steps, rows, _ = drafts.shape
        gradient = torch.empty(drafts.shape, dtype=torch.float32, device=drafts.device)  # [S,R,h]
        sums = torch.zeros(4, steps, device=drafts.device)  # divergence, cross-entropy, top-K, correct
        kept, hits = valid.clone(), torch.ones_like(valid)
        buffer = head_weight.new_empty(min(chunk, max(rows, 1)), head_weight.shape[0])
        overlap = config.divergence != "kl"
        own = torch.empty_like(buffer) if overlap else buffer  # p is needed beside q
        weight, k = config.divergence_weight, config.top_k_weight
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            p = _logits(features[part], head_weight, head_bias, own)  # [c,V]
            p = torch.softmax(p, dim=-1, out=p)
            top, ids = p[:, :certain].topk(min(config.top_k if k else 1, certain), dim=-1)  # [c,K]
            top = top.float()
            mass = top.sum(-1)  # P_K
            p_head = _times_head(p, head_weight)  # p W: [c,h]
            top_head = torch.bmm(top.unsqueeze(1), head_weight[ids].to(top.dtype)).squeeze(1)  # [c,h]
            p_bias, top_bias = torch.zeros_like(mass), torch.zeros_like(mass)
            if head_bias is not None:
                p_bias = (p @ head_bias.to(p.dtype)).float()
                top_bias = (top * head_bias[ids].float()).sum(-1)
            for step in range(steps):
                draft = drafts[step, part]
                q = _logits(draft, head_weight, head_bias, buffer)
                highest = q.amax(-1)  # several times faster on CPU than the index of the maximum
                likeliest = highest if certain == q.shape[1] else q[:, :certain].amax(-1)
                correct = q.gather(1, ids[:, :1]).squeeze(1) >= likeliest
                if config.aligned_top:
                    above = q > q.gather(1, tokens[part, None])
                    hits[step, part] = above.sum(-1) < config.aligned_top
                    if step:  # the row before was settled earlier: rows come in order
                        kept[step, part] &= (before[part] < 0) | hits[step - 1, before[part]]
                    hits[step, part] &= kept[step, part] | ~valid[step, part]
                q = torch.softmax(q, dim=-1, out=q)
                normaliser = highest.float() - q.amax(-1).float().log()  # log-sum-exp of the logits
                cross_entropy = normaliser - (draft * p_head).sum(-1) - p_bias
                top_k = mass * normaliser - (draft * top_head).sum(-1) - top_bias
                divergence, kl, tv = cross_entropy, torch.ones_like(mass), torch.zeros_like(mass)
                if overlap:
                    alpha = torch.minimum(p, q).sum(-1, dtype=torch.float32)
                    divergence, kl, tv = _overlap_loss(config.divergence, cross_entropy, alpha)
                losses = torch.stack([divergence, cross_entropy, top_k]) * kept[step, part]
                sums[:3, step] += losses.sum(1)
                sums[3, step] += (correct & valid[step, part]).sum()
                # Slope in the logits: weight * (kl * (q - p) + tv * slope of 1 - alpha) + k * (P_K q - top).
                if overlap:
                    inside = q * (p > q)
                    outer = weight * (kl + tv * inside.sum(-1, dtype=torch.float32)) + k * mass
                    q = q.mul_(outer[:, None]).sub_(inside.mul_((weight * tv)[:, None]))
                    slope = _times_head(q, head_weight)
                else:
                    slope = (weight + k * mass)[:, None] * _times_head(q, head_weight)
                slope -= (weight * kl)[:, None] * p_head + k * top_head
                gradient[step, part] = slope * kept[step, part, None]
        ctx.save_for_backward(gradient)
        ctx.dtype = drafts.dtype
        ctx.mark_non_differentiable(kept)
        return weight * sums[0] + k * sums[2], sums[1], sums[2], sums[3], kept

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None, None]).to(ctx.dtype), *[None] * 9


def _overlap_loss(kind: str, cross_entropy: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row, and how much of its slope is that of the forward KL and that of 1 - alpha."""
    alpha = alpha.clamp(min=1e-5)
    if kind == "tv":
        return 1 - alpha, torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "nla":
        return -alpha.log(), torch.zeros_like(alpha), 1 / alpha
    kl = torch.exp(-3 * alpha)  # eta = 3
    return kl * cross_entropy + (1 - kl) * (1 - alpha), kl, 1 - kl


def _logits(rows: Tensor, head_weight: Tensor, head_bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Logits [c,V] in the head's dtype, written into `buffer`."""
    logits = torch.mm(rows.to(head_weight.dtype), head_weight.t(), out=buffer[: len(rows)])
    return logits if head_bias is None else logits.add_(head_bias)


def _times_head(probabilities: Tensor, head_weight: Tensor) -> Tensor:
    return torch.mm(probabilities.to(head_weight.dtype), head_weight).float()
