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

A drafter may have a head of its own, for some of the ids, which learns (`head_slope.py`). Then W is that
head, and p the target's law on its ids, not brought back to 1: the mass outside is out of the drafter's
reach. So the first term of the first slope is P q W with P the sum of p, a row counts by what of it can be
learnt, and alpha = sum min(p, q) has the ceiling P.

Shapes: S draft steps, R trained rows, V vocabulary, D ids of it that the drafter scores, h hidden size.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from coral.drafters.recurrent.head_slope import HeadSlope
from coral.drafters.recurrent.target_law import FrozenHead, OwnHead, TargetLaw, logits, target_law, times_head

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
    covered: Tensor
    """Scalar: the target's mass on the ids that the drafter scores, summed over the rows of step 1."""


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


def draft_losses(
    drafts: Tensor,
    wanted: Wanted,
    head: FrozenHead,
    config: LossConfig,
    chunk: int | None = None,
    own: OwnHead | None = None,
) -> DraftLosses:
    """Compare draft features [S,R,h] with what is wanted of them.

    Args:
        chunk: rows that meet the LM head at a time; None: as `TrainConfig.head_chunk` says.
        own: the drafter's head, if it has one.
    """
    chunk = chunk or rows_at_a_time(len(head.weight))
    own = own or OwnHead(*head)
    decay = torch.tensor([config.step_decay**step for step in range(len(drafts))], device=drafts.device)
    wanted = wanted._replace(features=wanted.features.to(drafts.dtype))
    valid = kept = wanted.valid
    zero = torch.zeros(len(drafts), device=drafts.device)
    total, cross_entropy, top_k, correct, covered = zero, zero, zero, zero, zero.sum()
    if config.divergence_weight or config.top_k_weight or config.aligned_top:
        made = _HeadLoss.apply(drafts, own.weight, wanted, head, own, config, chunk)
        total, cross_entropy, top_k, correct, kept, covered = made
    goals = wanted.features.expand_as(drafts)
    distance = smooth_l1_loss(drafts, goals, reduction="none").mean(-1)  # [S,R]
    total = total + config.regression * decay * (distance * kept).sum(1)
    regression = (distance.detach() * valid).sum(1)
    return DraftLosses(total, regression, cross_entropy, top_k, correct, valid.sum(1), covered)


def rows_at_a_time(vocabulary: int) -> int:
    """Rows whose scores fill 64 MB in float32, and no fewer than 256, below which products get slow."""
    return max(256, 2**24 // vocabulary)


class _HeadLoss(torch.autograd.Function):
    """Weighted divergence and top-K loss, summed per step; gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        drafts: Tensor,
        weight: Tensor,
        wanted: Wanted,
        head: FrozenHead,
        own: OwnHead,
        config: LossConfig,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        (steps, rows, _), device = drafts.shape, drafts.device
        own, valid, certain = own._replace(weight=weight.to(head.weight.dtype)), wanted.valid, own.certain
        gradient = torch.empty(drafts.shape, dtype=torch.float32, device=device)  # [S,R,h]
        learnt = HeadSlope(weight.shape, config.top_k_weight, device) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(4, steps, device=device)  # divergence, cross-entropy, top-K, correct
        covered = torch.zeros((), device=device)
        kept, hits = valid.clone(), torch.ones_like(valid)
        buffer = head.weight.new_empty(min(chunk, max(rows, 1)), len(weight))
        # p has a buffer of its own where it is needed beside q.
        shared = len(weight) == len(head.weight) and config.divergence == "kl" and learnt is None
        for_law = buffer if shared else buffer.new_empty(len(buffer), len(head.weight))
        k = config.top_k if config.top_k_weight else 1
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            law = target_law(wanted.features[part], head, own, k, for_law)
            covered += (law.covered * valid[0, part]).sum()
            if own.renormalised:
                kept[:, part] &= law.inside
            for step in range(steps):
                draft = drafts[step, part]
                q = logits(draft, own, buffer)
                highest = q.amax(-1)  # several times faster on CPU than the index of the maximum
                likeliest = highest if certain == q.shape[1] else q[:, :certain].amax(-1)
                correct = (q.gather(1, law.ids[:, :1]).squeeze(1) >= likeliest) & law.inside
                if config.aligned_top:
                    hits[step, part] = _is_among(q, wanted.tokens[part], config.aligned_top)
                    _leave_out(kept, hits, wanted, step, part)
                q = torch.softmax(q, dim=-1, out=q)
                normaliser = highest.float() - q.amax(-1).float().log()  # log-sum-exp of the logits
                losses, slope = _compare(draft, q, normaliser, law, config)
                counts = kept[step, part] * config.step_decay**step
                sums[:3, step] += (losses * kept[step, part]).sum(1)
                sums[3, step] += (correct & valid[step, part]).sum()
                gradient[step, part] = _through(slope, law, own, config) * counts[:, None]
                if learnt is not None:
                    learnt.add(draft * counts[:, None], *slope)
            if learnt is not None:
                learnt.end_rows(law.p, law.ids, law.top)
        ctx.save_for_backward(gradient, None if learnt is None else learnt.total)
        ctx.dtypes = drafts.dtype, weight.dtype
        ctx.mark_non_differentiable(kept, covered)
        decay = config.step_decay ** torch.arange(steps, device=device)
        total = config.divergence_weight * sums[0] + config.top_k_weight * sums[2]
        return total * decay, sums[1], sums[2], sums[3], kept, covered

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, learnt = ctx.saved_tensors
        (of_draft, of_weight), scale = ctx.dtypes, upstream[0]
        if learnt is not None:
            learnt = (learnt * scale[0]).to(of_weight)  # the steps' losses were summed
        return (gradient * scale[:, None, None]).to(of_draft), learnt, None, None, None, None, None


def _is_among(logits: Tensor, tokens: Tensor, likeliest: int) -> Tensor:
    """Whether a token is among the likeliest of its row [c,D]; not if the drafter has no such id."""
    known = tokens < logits.shape[1]
    own = logits.gather(1, torch.where(known, tokens, 0)[:, None])
    return ((logits > own).sum(-1) < likeliest) & known


def _leave_out(kept: Tensor, hits: Tensor, wanted: Wanted, step: int, part: slice) -> None:
    """Update `kept` [S,R] for `aligned_top`, and from it `hits` [S,R]: all tokens up to this were likely.

    The row before each was settled earlier: rows come in order.
    """
    if step:
        before = wanted.before[part]
        kept[step, part] &= (before < 0) | hits[step - 1, before]
    hits[step, part] &= kept[step, part] | ~wanted.valid[step, part]


class _Slope(NamedTuple):
    """Of the weighted losses of c rows in their logits: outer * z - inner * p - top_k_weight * (p on K)."""

    z: Tensor
    """[c,D]."""
    outer: Tensor
    """[c]."""
    inner: Tensor
    """[c]."""


def _compare(
    draft: Tensor, q: Tensor, normaliser: Tensor, law: TargetLaw, config: LossConfig
) -> tuple[Tensor, _Slope]:
    """Divergence, cross-entropy and top-K loss of rows [3,c], and the slope of their weighted sum.

    Args:
        draft: draft features [c,h] whose distribution is q [c,D], which is used up, and whose logits have the
            log-sum-exp `normaliser` [c].
    """
    weight, k, mass = config.divergence_weight, config.top_k_weight, law.mass
    cross_entropy = law.total * normaliser - (draft * law.p_head).sum(-1) - law.p_bias
    top_k = mass * normaliser - (draft * law.top_head).sum(-1) - law.top_bias
    # Slope in the logits: weight * (kl * (P q - p) + tv * slope of 1 - alpha) + k * (P_K q - top).
    if config.divergence == "kl":
        divergence, kl = cross_entropy, torch.ones_like(mass)
        outer = weight * law.total + k * mass
    else:
        alpha = torch.minimum(law.p, q).sum(-1, dtype=torch.float32)
        divergence, kl, tv = _overlap_loss(config.divergence, cross_entropy, alpha)
        below = q * (law.p > q)
        outer = weight * (kl * law.total + tv * below.sum(-1, dtype=torch.float32)) + k * mass
        q = q.mul_(outer[:, None]).sub_(below.mul_((weight * tv)[:, None]))
        outer = torch.ones_like(outer)
    return torch.stack([divergence, cross_entropy, top_k]), _Slope(q, outer, weight * kl)


def _through(slope: _Slope, law: TargetLaw, own: OwnHead, config: LossConfig) -> Tensor:
    """What the slope is in the draft features, [c,h]."""
    by_draft = slope.outer[:, None] * times_head(slope.z, own.weight)
    return by_draft.sub_(slope.inner[:, None] * law.p_head).sub_(config.top_k_weight * law.top_head)


def _overlap_loss(kind: str, cross_entropy: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row, and how much of its slope is that of the forward KL and that of 1 - alpha."""
    alpha = alpha.clamp(min=1e-5)
    if kind == "tv":
        return 1 - alpha, torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "nla":
        return -alpha.log(), torch.zeros_like(alpha), 1 / alpha
    kl = torch.exp(-3 * alpha)  # eta = 3
    return kl * cross_entropy + (1 - kl) * (1 - alpha), kl, 1 - kl
