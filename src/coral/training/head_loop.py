"""What the training of heads shares: the target's distribution, and the loop that the updates run in.

Shapes: R trained rows, c rows at a time, V vocabulary, h hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from coral.data.features import FeatureBatch, FeatureSource, Rows, feature_batch
from coral.data.shards import refuse_other_target
from coral.drafters import kinds
from coral.drafters.kinds import Drafts
from coral.errors import CoralError
from coral.target.record import TargetLike
from coral.training.run_state import random_generator, stop_signals


class HeadTarget(TargetLike, FeatureSource, Protocol):
    """What the training of heads asks of a target."""

    @property
    def head_bias(self) -> Tensor | None: ...


def drafts_of(drafter: Any) -> Callable[[FeatureBatch, int], Drafts]:
    """(batch, S) -> what the LM head of a drafter learns from; raises CoralError where it has none."""
    draft = kinds.find(drafter.kind).draft
    if draft is None:
        raise CoralError(f"drafters of kind {drafter.kind!r} take no other LM head; use this one as it is.")
    return partial(draft, drafter)


@dataclass(frozen=True)
class HeadConfig:
    """How a head is trained on a frozen drafter."""

    updates: int = 300
    batch_size: int = 8
    steps: int = 4
    """Draft steps whose features it learns from: the depth of the trees it will serve."""
    learning_rate: float = 3e-3
    seed: int = 0
    log_every: int = 20
    """Updates between two reports."""


@torch.no_grad()
def target_laws(target: HeadTarget, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The target's log-probabilities after features [R,h], a few rows at a time: which, and [c,V] float32."""
    chunk = max(256, 2**24 // len(target.head_weight))
    for start in range(0, len(features), chunk):
        part = slice(start, start + chunk)
        logits = (features[part].to(target.head_weight.dtype) @ target.head_weight.T).float()
        yield part, (logits if target.head_bias is None else logits + target.head_bias).log_softmax(-1)


def descend(
    name: str,
    target: HeadTarget,
    dataset: Rows,
    parameters: Sequence[Tensor],
    gradient: Callable[[int, FeatureBatch], float],
    config: HeadConfig,
    console: Console | None = None,
    report: Callable[[], str] = str,
) -> None:
    """Train `parameters` in place by AdamW without decay, at a learning rate that falls as a cosine.

    Args:
        name: what is trained, for the bar and for errors.
        gradient: leaves the gradient of a batch in the parameters and returns the loss.
        report: what else is known since it was last called, shown beside the loss.

    Raises:
        CoralError: no data, features of another target, or a loss that is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM arrived; it is raised between two updates.
    """
    order = row_order(target, dataset, config.seed)
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    console = console or Console(stderr=True)
    losses = list[float]()  # since the last report
    with _bar(console) as progress, stop_signals() as stop:
        task = progress.add_task(name, total=config.updates)
        for update in range(config.updates):
            if stop:
                raise KeyboardInterrupt
            at = update * config.batch_size
            rows = [order[i % len(order)] for i in range(at, at + config.batch_size)]
            optimiser.zero_grad()
            losses.append(gradient(update, feature_batch(target, dataset, rows)))
            if not math.isfinite(losses[-1]):
                raise CoralError(
                    f"the {name}'s loss is not finite at update {update}; lower its learning rate."
                )
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * update / config.updates))
            optimiser.step()
            progress.update(task, advance=1)
            if (update + 1) % config.log_every == 0 or update + 1 == config.updates:
                text = f"update {update + 1}  loss {sum(losses) / len(losses):.4f}  {report()}".rstrip()
                progress.update(task, description=text)
                if not console.is_terminal:
                    part = (update + 1) / config.updates
                    console.print(f"{part:4.0%}  {text}", highlight=False, soft_wrap=True)
                losses.clear()


def row_order(target: HeadTarget, dataset: Rows, seed: int) -> list[int]:
    """All rows of the data in random order.

    Raises:
        CoralError: no data, or features of another target.
    """
    if len(dataset) == 0:
        raise CoralError("the prepared data holds no rows; prepare it from other conversations.")
    refuse_other_target(dataset, target)
    return torch.randperm(len(dataset), generator=random_generator(seed)).tolist()


def _bar(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
