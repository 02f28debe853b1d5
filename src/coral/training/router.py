"""Stage two: train the router of a routed head on a frozen drafter (CORAL, arXiv 2502.16880, section 3.2).

The router learns the target's probability mass in each group of ids from the draft features of every draft
step, by cross-entropy.

Shapes: S draft steps, R trained rows, G groups (one more for a core), h hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from coral.data.features import FeatureBatch, Rows
from coral.drafters.heads.routed import Router
from coral.training.head_loop import HeadConfig, HeadTarget, descend, drafts_of, target_laws


def train_router(
    target: HeadTarget,
    drafter: Any,
    dataset: Rows,
    ids: Tensor,
    active: int,
    config: HeadConfig,
    console: Console | None = None,
) -> tuple[Router, list[float]]:
    """Train a router for the groups `ids` [G, R]; the ids in none of them are the core, one more output.

    Returns:
        The router, and its group recall by draft step on the last tenth of the updates: the part of the
        target's mass that lies in the core and the `active` groups it ranks first, a row at a time.

    Raises:
        CoralError: no data, features of another target, or a loss that is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM arrived.
    """
    groups, group_of = len(ids), _group_of(ids, target.vocab_size)
    outputs = int(group_of.max()) + 1
    group_of = group_of.to(target.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        router = Router(target.hidden_size, outputs).to(target.device)
    # By draft step, the sum of recalls and the rows: since the last report, and of the last tenth.
    recent, last = torch.zeros(config.steps, 2), torch.zeros(config.steps, 2)

    def gradient(update: int, batch: FeatureBatch) -> float:
        drafts, valid, mass = _examples(target, drafter, batch, group_of, outputs, config.steps)
        log_mass = router(drafts)  # [S,R,outputs]
        loss = -((mass * log_mass).sum(-1) * valid).sum() / valid.sum().clamp(min=1)
        loss.backward()
        recall = group_recall(log_mass.detach()[..., :groups], mass[..., :groups], active)  # [S,R]
        recall = recall + mass[..., groups:].sum(-1)
        sums = torch.stack([(recall * valid).sum(1), valid.sum(1)], 1).cpu()
        recent.add_(sums)
        if update >= config.updates - max(1, config.updates // 10):
            last.add_(sums)
        return float(loss.detach())

    def report() -> str:
        shown = " ".join(f"{part:.1%}" for part in _mean(recent))
        recent.zero_()
        return f"recall {shown}"

    descend("router", target, dataset, [*router.parameters()], gradient, config, console, report)
    return router, _mean(last)


def _group_of(ids: Tensor, vocab_size: int) -> Tensor:
    """The group of each id, int64 [V]; G for those that no group holds."""
    groups, there = len(ids), ids >= 0
    group_of = torch.full((vocab_size,), groups)
    group_of[ids[there]] = torch.arange(groups)[:, None].expand_as(ids)[there]
    return group_of


def _mean(sums: Tensor) -> list[float]:
    return (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()


def group_recall(log_mass: Tensor, mass: Tensor, active: int) -> Tensor:
    """Target mass [...] inside the `active` groups that the router ranks first; both [..., G]."""
    chosen = log_mass.topk(min(active, log_mass.shape[-1]), dim=-1).indices
    return mass.expand_as(log_mass).gather(-1, chosen).sum(-1)


@torch.no_grad()
def _examples(
    target: HeadTarget, drafter: Any, batch: FeatureBatch, group_of: Tensor, groups: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draft features [S,R,h] of the trained rows, which of them count [S,R], and the target's mass [R,G]."""
    drafted = drafts_of(drafter)(batch, steps)
    mass = drafted.features.new_zeros(len(drafted.features), groups, dtype=torch.float32)
    for part, law in target_laws(target, drafted.features):
        mass[part].index_add_(1, group_of, law.exp())
    return drafted.drafts, drafted.valid, mass
