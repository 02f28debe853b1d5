"""Stage two: train the router of a routed head on a frozen drafter (CORAL, arXiv 2502.16880, section 3.2).

The router learns the target's probability mass in each group of ids from the draft features of every draft
step, by cross-entropy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor

from coral.data.features import FeatureBatch, Rows
from coral.drafters.feature.drafted import draft
from coral.drafters.feature.network import Drafter
from coral.drafters.heads.routed import Router
from coral.errors import CoralError
from coral.training.head_loop import HeadConfig, HeadTarget, descend, new_optimiser, target_laws
from coral.training.router_state import RouterState

KEEP_MINUTES = 5


def train_router(
    target: HeadTarget,
    drafter: Drafter,
    dataset: Rows,
    ids: Tensor,
    active: int,
    config: HeadConfig,
    console: Console | None = None,
    *,
    state: RouterState | None = None,
    keep: Callable[[RouterState], None] | None = None,
) -> tuple[Router, list[float]]:
    """Train a router for the groups `ids` [G, R]; the ids in none of them are the core, one more output.

    Args:
        state: go on from here; the outcome is that of a run that was never stopped.
        keep: called at the start, every few minutes and when a signal arrives, to write the state down.

    Returns:
        The router, and its group recall by draft step on the last tenth of the updates: the part of the
        target's mass that lies in the core and the `active` groups it ranks first, a row at a time.

    Raises:
        CoralError: no data, features of another target, or a loss that is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM arrived, and the state was kept.
    """
    groups, there = len(ids), ids >= 0
    group_of = torch.full((target.vocab_size,), groups)
    group_of[ids[there]] = torch.arange(groups)[:, None].expand_as(ids)[there]
    outputs = int(group_of.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        router = Router(drafter.config.hidden_size, outputs).to(target.device)
    group_of = group_of.to(target.device)
    optimiser = new_optimiser([*router.parameters()])
    first, caught = 0, torch.zeros(config.steps, 2)
    console = console or Console(stderr=True)
    if state is not None:
        first, caught = state.update, state.caught.clone()
        try:
            router.load_state_dict(state.router)
            optimiser.load_state_dict(state.optimiser)
            caught + torch.zeros(config.steps, 2)
        except Exception as error:  # torch raises many kinds
            raise CoralError(
                f"the state of the router is damaged ({type(error).__name__}); remove coral/head_training.pt "
                "in the drafter's directory to start again."
            ) from error
    if first:
        console.print(f"going on after update {first}", highlight=False)
    recent = torch.zeros(config.steps, 2)  # since the last report
    kept_at = -math.inf

    def keep_state(update: int, stopping: bool) -> None:
        nonlocal kept_at
        if keep is not None and (stopping or time.monotonic() - kept_at > 60 * KEEP_MINUTES):
            keep(RouterState(ids, update, caught, router.state_dict(), optimiser.state_dict()))
            kept_at = time.monotonic()

    def gradient(update: int, batch: FeatureBatch) -> float:
        drafts, kept, mass = _examples(target, drafter, batch, group_of, outputs, config.steps)
        log_mass = router(drafts)  # [S,R,outputs]
        loss = -((mass * log_mass).sum(-1) * kept).sum() / kept.sum().clamp(min=1)
        loss.backward()
        recall = group_recall(log_mass.detach()[..., :groups], mass[..., :groups], active)  # [S,R]
        recall = recall + mass[..., groups:].sum(-1)
        sums = torch.stack([(recall * kept).sum(1), kept.sum(1)], 1).cpu()
        recent.add_(sums)
        if update >= config.updates - max(1, config.updates // 10):
            caught.add_(sums)
        return float(loss.detach())

    def report() -> str:
        shown = " ".join(f"{part:.1%}" for part in _mean(recent))
        recent.zero_()
        return f"recall {shown}"

    descend(
        "router",
        target,
        dataset,
        [*router.parameters()],
        gradient,
        config,
        console,
        optimiser=optimiser,
        first=first,
        report=report,
        before=keep_state,
    )
    return router, _mean(caught)


def _mean(sums: Tensor) -> list[float]:
    return (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()


def group_recall(log_mass: Tensor, mass: Tensor, active: int) -> Tensor:
    """Target mass [...] inside the `active` groups that the router ranks first; both [..., G]."""
    chosen = log_mass.topk(min(active, log_mass.shape[-1]), dim=-1).indices
    return mass.expand_as(log_mass).gather(-1, chosen).sum(-1)


@torch.no_grad()
def _examples(
    target: HeadTarget, drafter: Drafter, batch: FeatureBatch, group_of: Tensor, groups: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draft features [S,R,h] of the trained rows, which of them count [S,R], and the target's mass [R,G]."""
    drafts, features, valid, *_ = draft(drafter, batch, steps)
    mass = features.new_zeros(len(features), groups, dtype=torch.float32)
    for part, law in target_laws(target, features):
        mass[part].index_add_(1, group_of, law.exp())
    return drafts, valid, mass
