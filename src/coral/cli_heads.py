"""`coral train-head`: give a drafter a cheaper LM head."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coral import options
from coral.errors import CoralError

if TYPE_CHECKING:
    from torch import Tensor

    from coral.data.prepared import PreparedData
    from coral.drafter.drafter import Drafter
    from coral.target import Target

_OPTIONS = {  # which kind reads which option
    "routed": ("groups", "active", "grouping", "updates"),
    "static": ("size",),
    "low_rank": ("rank", "rescored", "batches"),
}


def train_head(
    context: typer.Context,
    drafter: Annotated[Path, typer.Argument(help="Drafter directory; the head is added to it.")],
    data: options.Data,
    target: options.Target = None,
    kind: Annotated[
        str,
        typer.Option(
            help="routed: groups of ids, of which a router picks a few. static: the ids that the target "
            "writes most. low_rank: two thin matrices, made without training."
        ),
    ] = "routed",
    groups: Annotated[int, typer.Option(help="routed: groups of ids.", min=2)] = 16,
    active: Annotated[
        int, typer.Option(help="routed: groups multiplied for each level of the tree.", min=1)
    ] = 4,
    grouping: Annotated[
        str, typer.Option(help="routed: kmeans (similar ids), frequency (bands) or contiguous.")
    ] = "kmeans",
    updates: Annotated[int, typer.Option(help="routed: updates of the router.", min=1)] = 300,
    size: Annotated[
        int | None, typer.Option(help="static: ids that are kept. Default: a quarter.", min=1)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="low_rank: rank. Default: an eighth of the hidden size.", min=2)
    ] = None,
    rescored: Annotated[
        int, typer.Option(help="low_rank: likeliest ids that are scored again by their real rows.", min=0)
    ] = 32,
    batches: Annotated[
        int, typer.Option(help="low_rank: batches that show where draft features lie.", min=1)
    ] = 50,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Give a trained drafter a cheaper LM head. The text stays the target's own; only the speed changes.

    A stopped run goes on with the same command.
    """
    from coral import tuned
    from coral.data import shards
    from coral.drafter import checkpoint

    if kind not in _OPTIONS:
        raise CoralError(f"kind {kind!r} is not known; use {', '.join(_OPTIONS)}.")
    for other, names in _OPTIONS.items():
        for name in names if other != kind else ():
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                raise CoralError(f"--{name} belongs to --kind {other}; leave it out with --kind {kind}.")
    rows = shards.load(data)
    loaded = options.load_target(target, dtype, device, revision, trust_remote_code, rows)
    network = checkpoint.load(drafter, loaded, device=loaded.device).float()
    match kind:
        case "routed":
            _routed(drafter, network, loaded, rows, groups, active, grouping, updates, seed)
        case "static":
            _static(drafter, loaded, rows, size or loaded.vocab_size // 4)
        case "low_rank":
            rank = rank or max(2, loaded.hidden_size // 8)
            _low_rank(drafter, network, loaded, rows, rank, rescored, batches, seed)
    tuned.forget(drafter, kind)


def _routed(
    directory: Path,
    network: Drafter,
    target: Target,
    rows: PreparedData,
    groups: int,
    active: int,
    grouping: str,
    updates: int,
    seed: int,
) -> None:
    from rich.console import Console

    from coral.data.features import frequencies
    from coral.drafter import heads
    from coral.drafter.groups import split
    from coral.training import router_state
    from coral.training.router import RouterConfig, train_router

    config = RouterConfig(updates=updates, seed=seed)
    settings = {
        "groups": groups,
        "active": active,
        "grouping": grouping,
        "router": asdict(config),
        "dtype": str(target.dtype).removeprefix("torch."),
        "rows": len(rows.dataset),
    }
    state = router_state.load(directory, settings)
    if state is None:
        counts = frequencies(rows.dataset, target.vocab_size)
        ids = split(grouping, groups, target.head_weight, counts, seed)
    else:
        ids = state.ids
    router, recall = train_router(
        target,
        network,
        rows.dataset,
        ids,
        active,
        config,
        Console(stderr=True),
        state=state,
        keep=lambda state: router_state.save(directory, settings, state),
    )
    tensors = {f"router.{name}": tensor for name, tensor in router.state_dict().items()}
    heads.save(directory, "routed", {**tensors, "ids": ids.int()}, active=active)
    router_state.remove(directory)
    shown = " ".join(f"{part:.1%}" for part in recall)
    print(f"routed head: {active} of {groups} groups, recall by draft step {shown}: {directory}")


def _static(directory: Path, target: Target, rows: PreparedData, size: int) -> None:
    from coral.data.features import frequencies
    from coral.drafter import heads

    counts = frequencies(rows.dataset, target.vocab_size)
    order = counts.clone()
    order[special := _special_ids(target)] = order.max() + 1  # an end that cannot be drafted ends no draft
    ids = order.argsort(descending=True, stable=True)[: max(size, len(special))]
    heads.save(directory, "static", {"ids": ids.int()})
    share = float(counts[ids].sum() / counts.sum().clamp(min=1))
    print(f"static head: {len(ids)} ids, which are {share:.2%} of what the target wrote: {directory}")


def _special_ids(target: Target) -> Tensor:
    import torch

    special = target.tokenizer.all_special_ids if target.tokenizer else []
    return torch.tensor(sorted({*special, *target.eos_ids}), dtype=torch.int64)


def _low_rank(
    directory: Path,
    network: Drafter,
    target: Target,
    rows: PreparedData,
    rank: int,
    rescored: int,
    batches: int,
    seed: int,
) -> None:
    from rich.console import Console

    from coral.data.features import frequencies
    from coral.drafter import heads
    from coral.drafter.reduced import factorise
    from coral.training.low_rank import second_moment

    if rank > target.hidden_size:
        raise CoralError(f"rank {rank} is above the hidden size {target.hidden_size}; ask for less.")
    console = Console(stderr=True)
    moment = second_moment(target, network, rows.dataset, batches, seed=seed, console=console)
    weights = frequencies(rows.dataset, target.vocab_size).float().add(1).sqrt()
    up, down = factorise(target.head_weight, moment, rank, weights)
    heads.save(directory, "low_rank", {"up": up, "down": down}, rescored=rescored)
    print(f"low-rank head: rank {rank} of {target.hidden_size}, {rescored} ids rescored: {directory}")
