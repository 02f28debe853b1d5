"""Stage two: train the router of a routed head on a frozen drafter (CORAL, arXiv 2502.16880, section 3.2).

The router learns the target's probability mass in each group of ids from the draft features of every draft
step, by cross-entropy.
"""

from __future__ import annotations

import math
import time
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
from coral.drafter.routed import Router
from coral.errors import CoralError
from coral.training.losses import trained_rows
from coral.training.router_state import RouterState
from coral.training.state import stop_signals
from coral.training.unroll import unroll

KEEP_MINUTES = 5
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
    log_every: int = 20
    """Updates between two reports of the loss and the recall."""


def train_router(
    target: RouterTarget,
    drafter: Drafter,
    dataset: Rows,
    ids: Tensor,
    active: int,
    config: RouterConfig,
    console: Console | None = None,
    *,
    state: RouterState | None = None,
    keep: Callable[[RouterState], None] | None = None,
) -> tuple[Router, list[float]]:
    """Train a router for the groups `ids` [G, R].

    Args:
        state: go on from here; the outcome is that of a run that was never stopped.
        keep: called at the start, every few minutes and when a signal arrives, to write the state down.

    Returns:
        The router, and its group recall by draft step on the last tenth of the updates: the part of the
        target's mass that lies in the `active` groups it ranks first, a row at a time.

    Raises:
        CoralError: no data, features of another target, or a loss that is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM arrived, and the state was kept.
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
    first, caught = 0, torch.zeros(config.steps, 2)
    if state is not None:
        first, caught = state.update, state.caught.clone()
        router.load_state_dict(state.router)
        optimiser.load_state_dict(state.optimiser)
    console = console or Console(stderr=True)
    if first:
        console.print(f"going on after update {first}", highlight=False)
    recent, losses = torch.zeros(config.steps, 2), list[float]()  # since the last report
    with _bar(console) as progress, stop_signals() as stop:
        task = progress.add_task("router", total=config.updates, completed=first)
        kept_at = -math.inf
        for update in range(first, config.updates):
            if keep is not None and (stop or time.monotonic() - kept_at > 60 * KEEP_MINUTES):
                keep(RouterState(ids, update, caught, router.state_dict(), optimiser.state_dict()))
                kept_at = time.monotonic()
            if stop:
                raise KeyboardInterrupt
            at = update * config.batch_size
            rows = [order[i % len(order)] for i in range(at, at + config.batch_size)]
            drafts, kept, mass = _examples(
                target, drafter, feature_batch(target, dataset, rows), group_of, config.steps
            )
            log_mass = router(drafts)  # [S,R,G]
            loss = -((mass * log_mass).sum(-1) * kept).sum() / kept.sum().clamp(min=1)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise CoralError(
                    f"the router's loss is not finite at update {update}; lower its learning rate."
                )
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * update / config.updates))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            recall = group_recall(log_mass.detach(), mass, active)  # [S,R]
            sums = torch.stack([(recall * kept).sum(1), kept.sum(1)], 1).cpu()
            recent += sums
            if update >= config.updates - max(1, config.updates // 10):
                caught += sums
            progress.update(task, advance=1)
            if (update + 1) % config.log_every == 0:
                text = f"update {update + 1}  loss {sum(losses) / len(losses):.4f}  recall {_shown(recent)}"
                progress.update(task, description=text)
                if not console.is_terminal:
                    part = (update + 1) / config.updates
                    console.print(f"{part:4.0%}  {text}", highlight=False, soft_wrap=True)
                recent, losses = torch.zeros(config.steps, 2), []
    return router, _mean(caught)


def _bar(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _mean(sums: Tensor) -> list[float]:
    return (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()


def _shown(sums: Tensor) -> str:
    return " ".join(f"{part:.1%}" for part in _mean(sums))


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
