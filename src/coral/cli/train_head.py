"""`coral train-head`: give a drafter a cheaper LM head."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from coral.cli import options
from coral.errors import CoralError
from coral.progress import spinner


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
    groups: Annotated[int | None, typer.Option(help="routed: groups of ids. Default: 16.", min=2)] = None,
    active: Annotated[
        int | None,
        typer.Option(help="routed: groups multiplied for each level of the tree. Default: 4.", min=1),
    ] = None,
    grouping: Annotated[
        str | None,
        typer.Option(help="routed: kmeans (similar ids, default), frequency (bands) or contiguous."),
    ] = None,
    core: Annotated[
        int | None,
        typer.Option(
            help="routed: most frequent ids that are always multiplied, in no group. Default: 0.", min=0
        ),
    ] = None,
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
        int | None,
        typer.Option(
            help="low_rank: likeliest ids that are scored again by their real rows. Default: 32.", min=0
        ),
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(help="low_rank: batches that show where draft features lie. Default: 50.", min=1),
    ] = None,
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
        from coral.training.heads import MAKERS

    if kind not in MAKERS:
        raise CoralError(f"kind {kind!r} is not known; use {', '.join(MAKERS)}.")
    maker, given = MAKERS[kind], _given(context, {name for each in MAKERS.values() for name in each.takes})
    for name in given.keys() - maker.takes - {"seed"}:
        others = " or ".join(other for other, each in MAKERS.items() if name in each.takes)
        raise CoralError(f"--{name} belongs to --kind {others}; leave it out with --kind {kind}.")
    made_of = maker.given(**{name: value for name, value in given.items() if name in maker.takes})
    directory = checkpoint.own_directory(drafter)
    rows = shards.load(data)
    loaded = options.load_target(target, dtype, device, revision, trust_remote_code, rows, reads_much=True)
    report = maker.make(directory, loaded, rows.dataset, made_of, Console(stderr=True))
    print(f"{kind.replace('_', '-')} head: {report}: {directory}")


def _given(context: typer.Context, names: set[str]) -> dict[str, Any]:
    """Which of the options of these names the command line has, and what it says."""
    sources = {name: context.get_parameter_source(name) for name in names}
    there = [name for name, source in sources.items() if source is not None and source.name != "DEFAULT"]
    return {name: context.params[name] for name in there}
