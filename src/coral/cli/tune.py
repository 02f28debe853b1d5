"""`coral tune`: find the draft tree that is fastest on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coral.cli import options
from coral.errors import CoralError
from coral.progress import spinner

if TYPE_CHECKING:
    from coral.data.prepared import PreparedData
    from coral.target.target import Target


def tune(
    drafter: Annotated[
        str | None,
        typer.Argument(
            help="Drafter directory; the tree is written into it. With --no-write also a hub id. Default: "
            "the package's own, where it is installed.",
        ),
    ] = None,
    target: options.Target = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Prepared data whose held-out prompts are written. Default: general prompts that come with "
            "the package. The nearer to what you will ask, the better the tree."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(help="At most so many prompts.", min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens written for each prompt.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="That of the texts; 0 is greedy.")] = 0.0,
    head: options.Head = "auto",
    backend: options.Backend = "auto",
    deepen: Annotated[
        int | None,
        typer.Option(help="Append layers that change no output, up to N, as `coral bench --deepen` does."),
    ] = None,
    write: Annotated[bool, typer.Option(help="Write the tree down, or only print what was found.")] = True,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Find the draft tree that is fastest here for a drafter and its target, and write it into the drafter.

    The target writes the prompts once while the drafter grows large trees beside it; every smaller tree's
    acceptance follows from that, and with the measured costs of drafting and verification its speed. The
    best one then decodes the same prompts for real. `coral generate` and `coral bench` use it from then on,
    on this device, with this dtype, head, number of layers and --backend, unless --tree is given.
    """
    with spinner("Loading"):
        from rich.console import Console

        from coral.bench.deepen import append_layers
        from coral.data import shards
        from coral.decoding.sampling import Sampling
        from coral.drafters import checkpoint
        from coral.drafters.drafting import Drafting
        from coral.drafters.heads import store as heads
        from coral.target import default as models
        from coral.tuning.search import GRAPH_ROWS, tune_drafter
        from coral.tuning.table import summary, table

    sampling = Sampling(temperature, seed=seed)  # refuses what is out of range before any weight is read
    if drafter is None and target is not None:
        raise CoralError("say which drafter of this target to tune: coral tune DRAFTER --target ...")
    drafting = Drafting.parse(drafter or str(models.DRAFTER), head=head)
    if drafting.source is None or drafting.lookup:
        raise CoralError(f"{drafter!r} is no trained drafter; name the directory of one, without '+ngram'.")
    directory = (checkpoint.own_directory if write else checkpoint.locate)(drafting.source)
    kind = heads.resolve(directory, drafting.head)
    rows = shards.load(data) if data is not None else None
    loaded = options.load_target(target, dtype, device, revision, trust_remote_code, rows, to_write=True)
    append_layers(loaded, deepen)
    found, path = tune_drafter(
        loaded.on(backend, GRAPH_ROWS),
        directory,
        kind,
        _prompts(loaded, rows)[:prompts],
        write=write,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    )
    Console(width=100).print(table(found))
    print(summary(found))
    if path is None:
        print(f"not written down; to use it: --tree {found.best.tree_size}")
    else:
        print(f"tree {found.best.tree_size}: {path}")


def expect(target: Target, drafter: Path, prompts: list[list[int]]) -> None:
    """Say what a drafter that was just trained gains here, by tuning on a few prompts."""
    from coral.drafters.drafting import Drafting
    from coral.tuning.search import tune as run

    make = Drafting(drafter, "full", fallback=False).proposer
    found = run(target.on(), make, prompts, max_new_tokens=48)
    print(
        f"expect {found.predicted:.2f}x (tau {found.best.tau:.2f}) here with --tree {found.best.tree_size} "
        "and the full head; a head from `coral train-head` costs less, and `coral tune` writes the tree down"
    )


def _prompts(target: Target, rows: PreparedData | None) -> list[list[int]]:
    from coral.tuning.search import general_prompts

    if rows is None:
        return general_prompts(target)
    if not rows.held_out_prompts:
        raise CoralError("the data holds no held-out prompts; prepare it with --held-out above 0.")
    return rows.held_out_prompts
