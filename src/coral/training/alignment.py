"""Cross-step representation alignment (CSRA), the training loss of CORAL (arXiv 2502.16880).

Row t of every draft step predicts the same feature, so the outputs of different steps at one row should
agree. For two steps with outputs q and f at rows t, u, cosine similarity and temperature T, the loss is
InfoNCE:

    l = - mean over t of log( exp(cos(q_t, f_t) / T) / sum over u of exp(cos(q_t, f_u) / T) ).

The paper's weight, temperature and pairs of steps are not public; the options and defaults below are our
reading.

Shapes: S draft steps, R trained rows, A sampled rows, h hidden size.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


@dataclass(frozen=True)
class AlignmentConfig:
    """Options of the alignment loss."""

    weight: float = 0.0
    """Weight beside the other losses; 0 leaves it out."""
    temperature: float = 0.1
    """Divides the cosines: the lower, the more the closest wrong rows count."""
    pairs: Literal["consecutive", "all", "anchor"] = "consecutive"
    """Which steps are compared: neighbours, all pairs, or each with step 1."""
    negatives: Literal["batch", "sequence"] = "batch"
    """Whether other rows of the whole batch or only of the same sequence are told apart."""
    stop_gradient: bool = False
    """Let only the later step of a pair learn: the earlier one saw better inputs."""
    max_rows: int = 512
    """Rows drawn from each batch, so that the matrix of similarities stays small."""


def alignment_loss(
    drafts: Tensor,
    valid: Tensor,
    sequences: Tensor,
    config: AlignmentConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean alignment loss over pairs of steps and both directions, a float32 scalar.

    Args:
        drafts: draft features of the trained rows, [S,R,h].
        valid: bool [S,R]; only rows that are valid at every step are compared.
        sequences: the sequence of the batch that each row comes from, int64 [R].
        generator: a CPU generator that draws the rows when there are more than `max_rows`.
    """
    rows = valid.all(0).nonzero().squeeze(1)
    if len(rows) > config.max_rows:
        chosen = torch.randperm(len(rows), generator=generator)[: config.max_rows]
        rows = rows[chosen.sort().values.to(rows.device)]
    if len(rows) < 2 or len(drafts) < 2:
        return drafts.sum() * 0.0  # nothing to compare, but every process must still have a gradient
    views = normalize(drafts[:, rows].float(), dim=-1)  # [S,A,h]
    own = torch.arange(len(rows), device=rows.device)
    foreign = sequences[rows][:, None] != sequences[rows][None, :]  # [A,A]
    losses = []
    for early, late in _pairs(len(drafts), config.pairs):
        first = views[early].detach() if config.stop_gradient else views[early]
        similarity = first @ views[late].t() / config.temperature  # [A,A]
        if config.negatives == "sequence":
            similarity = similarity.masked_fill(foreign, float("-inf"))
        losses.append((cross_entropy(similarity, own) + cross_entropy(similarity.t(), own)) / 2)
    return torch.stack(losses).mean()


def _pairs(steps: int, pairs: str) -> list[tuple[int, int]]:
    if pairs == "all":
        return list(combinations(range(steps), 2))
    return [(0 if pairs == "anchor" else late - 1, late) for late in range(1, steps)]
