"""What a low-rank head is made from: where draft features lie and, if tuned, the target's distribution."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import kl_div, linear

from coral.data.features import FeatureBatch, Rows, feature_batch
from coral.progress import bar
from coral.training.head_loop import HeadConfig, HeadTarget, descend, drafts_of, row_order, target_laws

TUNING = HeadConfig(updates=0, learning_rate=4e-4)
"""SlimSpec's learning rate; without updates the factors are not tuned."""


@torch.no_grad()
def second_moment(
    target: HeadTarget,
    drafter: Any,
    dataset: Rows,
    batches: int,
    config: HeadConfig,
    console: Console | None = None,
) -> Tensor:
    """E[f f^T] [h, h] float32 over the draft features f of all draft steps, on random rows of data.

    Raises:
        CoralError: no data, or features of another target.
    """
    order = row_order(target, dataset, config.seed)
    draft, width, size = drafts_of(drafter), target.hidden_size, config.batch_size
    moment, count = torch.zeros(width, width, device=target.device), 0
    with bar(console, "draft features", batches) as advance:
        for start in range(0, min(batches * size, len(order)), size):
            batch = feature_batch(target, dataset, order[start : start + size])
            drafted = draft(batch, config.steps)
            drafts = drafted.drafts[drafted.valid]  # [N,h]
            moment += drafts.T @ drafts
            count += len(drafts)
            advance(1)
    return moment / max(count, 1)


def tune(
    target: HeadTarget,
    drafter: Any,
    dataset: Rows,
    up: Tensor,
    down: Tensor,
    config: HeadConfig,
    console: Console | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower the forward KL divergence from the target's distribution to that of the factors, the drafter
    frozen (SlimSpec, arXiv 2605.10453, trains both together).

    Args:
        up, down: [V, r] and [r, h] float32, where to start.

    Returns:
        The tuned factors.

    Raises:
        CoralError: no data, features of another target, or a loss that is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM arrived.
    """
    up, down = (part.detach().clone().to(target.device).requires_grad_() for part in (up, down))
    bias = None if target.head_bias is None else target.head_bias.float()
    draft = drafts_of(drafter)

    def gradient(update: int, batch: FeatureBatch) -> float:
        with torch.no_grad():
            drafted = draft(batch, config.steps)
        total, count = torch.zeros((), device=up.device), drafted.valid.sum().clamp(min=1)
        for part, law in target_laws(target, drafted.features):
            for drafts, valid in zip(drafted.drafts[:, part], drafted.valid[:, part], strict=True):
                scores = linear(linear(drafts[valid], down), up, bias).log_softmax(-1)
                loss = kl_div(scores, law[valid], reduction="sum", log_target=True) / count
                loss.backward()  # at once, so that never all rows are V wide
                total += loss.detach()
        return float(total)

    descend("low-rank head", target, dataset, [up, down], gradient, config, console)
    return up.detach(), down.detach()
