"""Stage two: train the router of a routed head on a frozen drafter (CORAL, arXiv 2502.16880, section 3.2).

The router learns the target's probability mass in each group of ids from the draft features of every draft
step, by cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from coral.data.features import FeatureBatch, FeatureSource, Rows, feature_batch
from coral.data.shards import refuse_other_target
from coral.drafter.checkpoint import TargetLike
from coral.drafter.drafter import Drafter
from coral.drafter.heads import Router
from coral.errors import CoralError
from coral.training.losses import trained_rows
from coral.training.unroll import unroll

_CHUNK = 512  # trained rows that meet the LM head at a time


class RouterTarget(TargetLike, FeatureSource, Protocol):
    """What stage two asks of a target."""

    @property
    def head_bias(self) -> Tensor | None: ...


@dataclass(frozen=True)
class RouterConfig:
    """How a router is trained."""

    updates: int = 300
    batch_size: int = 8
    steps: int = 4
    """Draft steps whose features it learns from: the depth of the trees it will serve."""
    learning_rate: float = 3e-3
    seed: int = 0


def train_router(
    target: RouterTarget,
    drafter: Drafter,
    dataset: Rows,
    ids: Tensor,
    active: int,
    config: RouterConfig,
    console: Console | None = None,
) -> tuple[Router, list[float]]:
    """Train a router for the groups `ids` [G, R].

    Returns:
        The router, and its group recall by draft step on the last tenth of the updates: the part of the
        target's mass that lies in the `active` groups it ranks first, a row at a time.

    Raises:
        CoralError: no data, features of another target, or a loss that is not finite.
    """
    if len(dataset) == 0:
        raise CoralError("the prepared data holds no rows; prepare it from other conversations.")
    refuse_other_target(dataset, target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        router = Router(drafter.config.hidden_size, len(ids)).to(target.device)
        order = torch.randperm(len(dataset)).tolist()
    group_of = torch.empty(int(ids.max()) + 1, dtype=torch.int64)
    group_of[ids[ids >= 0]] = torch.arange(len(ids))[:, None].expand_as(ids)[ids >= 0]
    optimiser = torch.optim.AdamW(
        router.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _cosine(config.updates))
    caught = torch.zeros(config.steps, 2)
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn()
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task("router", total=config.updates)
        for update in range(config.updates):
            first = update * config.batch_size
            rows = [order[i % len(order)] for i in range(first, first + config.batch_size)]
            drafts, kept, mass = _examples(
                target, drafter, feature_batch(target, dataset, rows), group_of, config.steps
            )
            log_mass = router(drafts)  # [S,R,G]
            loss = -((mass * log_mass).sum(-1) * kept).sum() / kept.sum().clamp(min=1)
            shown_loss = float(loss.detach())
            if not math.isfinite(shown_loss):
                raise CoralError(
                    f"the router's loss is not finite at update {update}; lower its learning rate."
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            recall = group_recall(log_mass.detach(), mass, active)  # [S,R]
            if update >= config.updates - max(1, config.updates // 10):
                caught += torch.stack([(recall * kept).sum(1), kept.sum(1)], 1).cpu()
            shown = float((recall * kept).sum() / kept.sum().clamp(min=1))
            progress.update(task, advance=1, description=f"router  loss {shown_loss:.3f}  recall {shown:.1%}")
    return router, (caught[:, 0] / caught[:, 1].clamp(min=1)).tolist()


def group_recall(log_mass: Tensor, mass: Tensor, active: int) -> Tensor:
    """Target mass [...] inside the `active` groups that the router ranks first; both [..., G]."""
    chosen = log_mass.topk(min(active, log_mass.shape[-1]), dim=-1).indices
    return mass.expand_as(log_mass).gather(-1, chosen).sum(-1)


@torch.no_grad()
def _examples(
    target: RouterTarget, drafter: Drafter, batch: FeatureBatch, group_of: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draft features [S,R,h] of the trained rows, which of them count [S,R], and the target's mass [R,G]."""
    outputs = unroll(drafter, batch.embeddings, batch.features, batch.document_starts, steps)
    valid = trained_rows(batch.loss_mask, batch.document_starts, steps)
    sequence, row = valid[0].nonzero(as_tuple=True)
    features, group_of = batch.features[sequence, row + 1], group_of.to(batch.features.device)
    masses = []
    for part in features.split(_CHUNK):
        logits = (part.to(target.head_weight.dtype) @ target.head_weight.T).float()
        if target.head_bias is not None:
            logits += target.head_bias
        mass = logits.new_zeros(len(part), int(group_of.max()) + 1)
        masses.append(mass.index_add_(1, group_of, logits.softmax(-1)))
    drafts = torch.stack([output[sequence, row] for output in outputs]).float()
    return drafts, valid[:, sequence, row], torch.cat(masses) if masses else features.new_zeros(0, 1)


def _cosine(updates: int) -> Callable[[int], float]:
    return lambda update: 0.5 * (1 + math.cos(math.pi * min(1.0, update / updates)))


def frequencies(dataset: Rows, vocab_size: int) -> Tensor:
    """How often the target writes each id in prepared data, [V]."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for index in range(len(dataset)):
        example = dataset[index]
        written = torch.as_tensor(example["input_ids"])[torch.as_tensor(example["loss_mask"]).bool()]
        counts += torch.bincount(written, minlength=vocab_size)
    return counts
