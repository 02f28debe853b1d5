"""Alignment of draft steps: losses that draw the outputs of several steps at one row together.

Row t of every draft step predicts the same feature, so the outputs of different steps there should agree.
Three ways, for a row t and two views q and f of it (outputs of two steps, or the target's feature and an
output):

- csra, the training loss of CORAL (arXiv 2502.16880), InfoNCE over cosine similarities with temperature T:

      l = - mean over t of log( exp(cos(q_t, f_t) / T) / sum over u of exp(cos(q_t, f_u) / T) ).

  The paper's weight, temperature and pairs of steps are not public; the options and defaults below are our
  reading.
- cosine, the consistency loss of CORE (arXiv 2206.02749): mean over t of (1 - cos(q_t, f_t))^2. No negatives.
- topology, the relation graph of TRAIN (arXiv 2311.17607): for each step, the KL divergence from the target's
  neighbourhoods P(u|t) = softmax over u != t of cos(f_t, f_u) / T to the drafter's. Its kernel is ours.

Shapes: S draft steps, R trained rows, A sampled rows, h hidden size.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, normalize


@dataclass(frozen=True)
class AlignmentConfig:
    """Options of the alignment loss."""

    kind: Literal["none", "csra", "cosine", "topology"] = "none"
    """Which loss; see the head of `alignment.py`."""
    weight: Annotated[float, Field(ge=0, le=1e6)] = 0.1
    """Weight beside the other losses."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.1
    """csra, topology: divides the cosines; the lower, the more the closest rows count."""
    pairs: Literal["consecutive", "all", "anchor"] = "consecutive"
    """csra, cosine: which views are compared: neighbours, all pairs, or each with the first."""
    target_view: bool = False
    """csra, cosine: the target's feature is the first view, before the output of step 1."""
    negatives: Literal["batch", "sequence", "other_tokens"] = "batch"
    """csra: what a row is told apart from: the other rows of the batch, of its sequence, or those of the
    batch that predict another token."""
    stop_gradient: bool = False
    """csra, cosine: let only the later step of a pair learn: the earlier one saw better inputs."""
    max_rows: Annotated[int, Field(ge=2, le=2**16)] = 512
    """Rows drawn from each batch, so that the matrix of similarities stays small."""


def alignment_loss(
    drafts: Tensor,
    features: Tensor,
    valid: Tensor,
    sequences: Tensor,
    tokens: Tensor,
    config: AlignmentConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean alignment loss over pairs of views (csra: and both directions), a float32 scalar.

    Args:
        drafts: draft features of the trained rows, [S,R,h]; features: the target's, [R,h].
        valid: bool [S,R]; only rows that are valid at every step are compared.
        sequences: the sequence of the batch that each row comes from, int64 [R].
        tokens: the token that each row is to predict, int64 [R].
        generator: a CPU generator that draws the rows when there are more than `max_rows`.
    """
    rows = valid.all(0).nonzero().squeeze(1)
    if len(rows) > config.max_rows:
        chosen = torch.randperm(len(rows), generator=generator)[: config.max_rows]
        rows = rows[chosen.sort().values.to(rows.device)]
    views, goal = drafts[:, rows].float(), features[rows].float()  # [S,A,h], [A,h]
    if config.kind == "topology" and len(rows) > 2:
        return torch.stack([_topology(view, goal, config.temperature) for view in views]).mean()
    if config.target_view:
        views = torch.cat([goal.unsqueeze(0), views])
    pairs = _pairs(len(views), config.pairs)
    if config.kind in ("none", "topology") or len(rows) < 2 or not pairs:
        return drafts.sum() * 0.0  # nothing to compare, but every process must still have a gradient
    excluded = None  # [A,A]
    if config.negatives == "sequence":
        excluded = sequences[rows][:, None] != sequences[rows]
    elif config.negatives == "other_tokens":
        excluded = tokens[rows][:, None] == tokens[rows]
        excluded.fill_diagonal_(False)
    losses = []
    for early, late in pairs:
        first = views[early].detach() if config.stop_gradient else views[early]
        if config.kind == "cosine":
            losses.append((1 - cosine_similarity(first, views[late], dim=-1)).square().mean())
        else:
            losses.append(_contrast(first, views[late], config.temperature, excluded))
    return torch.stack(losses).mean()


def _contrast(first: Tensor, second: Tensor, temperature: float, excluded: Tensor | None) -> Tensor:
    """InfoNCE of two views [A,h] in both directions; pairs `excluded` [A,A] are no negatives."""
    similarity = normalize(first, dim=-1) @ normalize(second, dim=-1).t() / temperature  # [A,A]
    if excluded is not None:
        similarity = similarity.masked_fill(excluded, float("-inf"))
    own = torch.arange(len(first), device=first.device)
    return (cross_entropy(similarity, own) + cross_entropy(similarity.t(), own)) / 2


def _topology(view: Tensor, goal: Tensor, temperature: float) -> Tensor:
    """KL of the neighbourhoods among `view` [A,h] from those among `goal` [A,h], a mean over rows."""
    itself = torch.eye(len(view), dtype=torch.bool, device=view.device)
    drafted, wanted = (
        (normalize(x, dim=-1) @ normalize(x, dim=-1).t() / temperature)[~itself].view(len(x), -1)
        for x in (view, goal)
    )
    return kl_div(drafted.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")


def _pairs(views: int, pairs: str) -> list[tuple[int, int]]:
    if pairs == "all":
        return list(combinations(range(views), 2))
    return [(0 if pairs == "anchor" else late - 1, late) for late in range(1, views)]
