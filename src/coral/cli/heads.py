"""`coral train-head`: give a drafter a cheaper LM head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coral.cli import options
from coral.errors import CoralError

if TYPE_CHECKING:
    from coral.data.prepared import PreparedData
    from coral.drafters.feature.network import Drafter
    from coral.target.target import Target

_OPTIONS = {  # which kind reads which option
    "routed": ("groups", "active", "grouping", "core", "updates"),
    "static": ("size",),
    "low_rank": ("rank", "rescored", "batches", "updates"),
}


def train_head(
    context: typer.Context,
    drafter: Annotated[str, typer.Argument(help="Drafter directory; the head is added to it.")],
    data: options.Data,
    target: options.Target = None,
    kind: Annotated[
        str,
        typer.Option(
            help="routed: groups of ids, of which a router picks a few. static: the ids that the target "
            "writes most. low_rank: two thin matrices, which need no training."
        ),
    ] = "routed",
    groups: Annotated[int, typer.Option(help="routed: groups of ids.", min=2)] = 16,
    active: Annotated[
        int, typer.Option(help="routed: groups multiplied for each level of the tree.", min=1)
    ] = 4,
    grouping: Annotated[
        str, typer.Option(help="routed: kmeans (similar ids), frequency (bands) or contiguous.")
    ] = "kmeans",
    core: Annotated[
        int, typer.Option(help="routed: most frequent ids that are always multiplied, in no group.", min=0)
    ] = 0,
    updates: Annotated[
        int | None,
        typer.Option(
            help="routed: updates of the router. Default: 300. low_rank: updates that tune the matrices. "
            "Default: none.",
            min=0,
        ),
    ] = None,
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

    If it is stopped, the drafter's heads stay as they were, and the same command starts again.
    """
    from coral.data import shards
    from coral.drafters import checkpoint, tuned
    from coral.locks import locked

    if kind not in _OPTIONS:
        raise CoralError(f"kind {kind!r} is not known; use {', '.join(_OPTIONS)}.")
    for other, names in _OPTIONS.items():
        for name in set(names) - set(_OPTIONS[kind]):
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                raise CoralError(f"--{name} belongs to --kind {other}; leave it out with --kind {kind}.")
    if kind == "routed" and updates == 0:
        raise CoralError("a router that is not trained is of no use; ask for at least one of --updates.")
    directory = checkpoint.own_directory(drafter)
    rows = shards.load(data)
    loaded = options.load_target(target, dtype, device, revision, trust_remote_code, rows)
    with locked(directory):
        network = checkpoint.load(directory, loaded, device=loaded.device).float()
        match kind:
            case "routed":
                updates = updates or 300
                _routed(directory, network, loaded, rows, groups, active, grouping, core, updates, seed)
            case "static":
                _static(directory, loaded, rows, size or loaded.vocab_size // 4)
            case "low_rank":
                rank = rank or max(2, loaded.hidden_size // 8)
                _low_rank(directory, network, loaded, rows, rank, rescored, batches, updates or 0, seed)
        tuned.forget(directory, kind)


def _routed(
    directory: Path,
    network: Drafter,
    target: Target,
    rows: PreparedData,
    groups: int,
    active: int,
    grouping: str,
    core: int,
    updates: int,
    seed: int,
) -> None:
    from rich.console import Console

    from coral.data.features import frequencies
    from coral.drafters.heads import store as heads
    from coral.drafters.heads.groups import outside, split
    from coral.drafters.heads.vocabulary import most_frequent, special_ids
    from coral.training.head_loop import HeadConfig
    from coral.training.router import train_router

    config = HeadConfig(updates=updates, seed=seed)
    counts = frequencies(rows.dataset, target.vocab_size)
    frequent = most_frequent(counts, special_ids(target), core)
    ids = split(grouping, groups, target.head_weight, counts, seed, frequent)
    router, recall = train_router(target, network, rows.dataset, ids, active, config, Console(stderr=True))
    tensors = {f"router.{name}": tensor for name, tensor in router.state_dict().items()}
    core = len(outside(ids, target.vocab_size))  # with all special ids, it may be more than asked for
    heads.save(directory, "routed", {**tensors, "ids": ids.int()}, active=active, core=core)
    what = f"{active} of {groups} groups" + (f" beside a core of {core} ids" if core else "")
    shown = " ".join(f"{part:.1%}" for part in recall)
    print(f"routed head: {what}, recall by draft step {shown}: {directory}")


def _static(directory: Path, target: Target, rows: PreparedData, size: int) -> None:
    from coral.data.features import frequencies
    from coral.drafters.heads import store as heads
    from coral.drafters.heads.vocabulary import most_frequent, special_ids

    counts = frequencies(rows.dataset, target.vocab_size)
    ids = most_frequent(counts, special_ids(target), size)
    heads.save(directory, "static", {"ids": ids.int()})
    token_map = heads.save_token_map(directory, ids)
    share = float(counts[ids].sum() / counts.sum().clamp(min=1))
    print(f"static head: {len(ids)} ids, which are {share:.2%} of what the target wrote: {directory}")
    print(f"token map for SGLang (--speculative-token-map): {token_map}")


def _low_rank(
    directory: Path,
    network: Drafter,
    target: Target,
    rows: PreparedData,
    rank: int,
    rescored: int,
    batches: int,
    updates: int,
    seed: int,
) -> None:
    from rich.console import Console

    from coral.data.features import frequencies
    from coral.drafters.heads import store as heads
    from coral.drafters.heads.reduced import factorise
    from coral.training.head_loop import HeadConfig
    from coral.training.low_rank import TUNING_RATE, second_moment, tune

    if rank > target.hidden_size:
        raise CoralError(f"rank {rank} is above the hidden size {target.hidden_size}; ask for less.")
    console = Console(stderr=True)
    moment = second_moment(target, network, rows.dataset, batches, seed=seed, console=console)
    weights = frequencies(rows.dataset, target.vocab_size).float().add(1).sqrt()
    up, down = factorise(target.head_weight, moment, rank, weights)
    if updates:
        config = HeadConfig(updates=updates, learning_rate=TUNING_RATE, seed=seed)
        up, down = tune(target, network, rows.dataset, up, down, config, console)
    heads.save(directory, "low_rank", {"up": up, "down": down}, rescored=rescored)
    tuned = f", tuned in {updates} updates" if updates else ""
    print(f"low-rank head: rank {rank} of {target.hidden_size}, {rescored} ids rescored{tuned}: {directory}")
