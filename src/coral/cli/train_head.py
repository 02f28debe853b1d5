"""`coral train-head`: give a drafter a cheaper LM head."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from coral.cli import options
from coral.errors import CoralError
from coral.progress import spinner

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
    with spinner("Loading"):
        from rich.console import Console

        from coral.data import shards
        from coral.drafters import checkpoint
        from coral.training import heads
        from coral.training.factors import TUNING
        from coral.training.head_loop import HeadConfig

    _refuse_options_of_others(context, kind)
    if kind == "routed" and updates == 0:
        raise CoralError("a router that is not trained is of no use; ask for at least one of --updates.")
    directory = checkpoint.own_directory(drafter)
    rows = shards.load(data)
    loaded = options.load_target(target, dtype, device, revision, trust_remote_code, rows, reads_much=True)
    given, console = (directory, loaded, rows.dataset), Console(stderr=True)
    match kind:
        case "static":
            static = heads.make_static(*given, size)
            share = f"{len(static.ids)} ids, which are {static.share:.2%} of what the target wrote"
            print(f"static head: {share}: {directory}")
            print(f"token map for SGLang (--speculative-token-map): {static.token_map}")
        case "routed":
            wanted = heads.RoutedOptions(groups, active, grouping, core)
            config = HeadConfig(updates=updates or 300, seed=seed)
            routed = heads.make_routed(*given, wanted, config, console)
            what = f"{active} of {groups} groups"
            what += f" beside a core of {routed.core} ids" if routed.core else ""
            recall = " ".join(f"{part:.1%}" for part in routed.recall)
            print(f"routed head: {what}, recall by draft step {recall}: {directory}")
        case "low_rank":
            tuning = replace(TUNING, updates=updates or 0, seed=seed)
            factors = heads.LowRankOptions(rank, rescored, batches)
            rank = heads.make_low_rank(*given, factors, tuning, console)
            what = f"rank {rank} of {loaded.hidden_size}, {rescored} ids rescored"
            what += f", tuned in {updates} updates" if updates else ""
            print(f"low-rank head: {what}: {directory}")


def _refuse_options_of_others(context: typer.Context, kind: str) -> None:
    """Raise CoralError for an unknown kind of head, or an option that only another kind reads."""
    if kind not in _OPTIONS:
        raise CoralError(f"kind {kind!r} is not known; use {', '.join(_OPTIONS)}.")
    for other, names in _OPTIONS.items():
        for name in set(names) - set(_OPTIONS[kind]):
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                raise CoralError(f"--{name} belongs to --kind {other}; leave it out with --kind {kind}.")
