"""`coral tune`: find the draft tree that is fastest on this machine."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coral.cli import options
from coral.errors import CoralError
from coral.progress import spinner

if TYPE_CHECKING:
    from coral.data.prepared import PreparedData
    from coral.target.target import Target
    from coral.tuning.run import Tuned


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
    compile: options.Compile = None,
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
    on this device, with this dtype, head, number of layers and --compile, unless --tree is given.
    """
    with spinner("Loading"):
        from coral.api import make_proposer, read_name
        from coral.bench.deepen import deepen as deepen_
        from coral.data import shards
        from coral.decoding.sampling import Sampling
        from coral.drafters import checkpoint, tuned
        from coral.drafters.heads import store as heads
        from coral.locks import locked
        from coral.target import default as models
        from coral.target.native import suits
        from coral.tuning.run import tune as run

    sampling = Sampling(temperature, seed=seed)  # refuses what is out of range before any weight is read
    if drafter is None and target is not None:
        raise CoralError("say which drafter of this target to tune: coral tune DRAFTER --target ...")
    source, head, lookup = read_name(drafter or str(models.DRAFTER), head)
    if source is None or lookup:
        raise CoralError(f"{drafter!r} is no trained drafter; name the directory of one, without '+ngram'.")
    directory = checkpoint.own_directory(source) if write else checkpoint.locate(source)
    kind = heads.resolve(directory, head)
    rows = shards.load(data) if data is not None else None
    loaded = options.load_target(target, dtype, device, revision, trust_remote_code, rows, to_write=True)
    if deepen:
        if loaded.blocks is not None:
            raise CoralError("appended layers have no packed blocks; leave out --deepen, or use dtype auto.")
        deepen_(loaded.model, deepen)
    compile = suits(loaded) if compile is None else compile
    place = tuned.Place.of(loaded, kind, compile)
    with locked(directory) if write else nullcontext():
        tuned.find(directory, place)  # a file that cannot be read is refused before minutes of work
        found = run(
            loaded,
            lambda target: make_proposer(target, directory, head=kind),
            _prompts(loaded, rows)[:prompts],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            compile=compile,
        )
        _show(found)
        if write:
            path = tuned.save(directory, place, found.best.budget, found.predicted, found.achieved)
            print(f"tree {found.best.budget}: {path}")
        else:
            print(f"not written down; to use it: --tree {found.best.budget}")


def expect(target: Target, drafter: Path, prompts: list[list[int]]) -> None:
    """Say what a drafter that was just trained gains here, by tuning on a few prompts."""
    from coral.api import make_proposer
    from coral.target.native import suits
    from coral.tuning.run import tune as run

    found = run(
        target,
        lambda target: make_proposer(target, drafter, head="full"),
        prompts,
        max_new_tokens=48,
        compile=suits(target),
    )
    print(
        f"expect {found.predicted:.2f}x (tau {found.best.tau:.2f}) here with --tree {found.best.budget} and "
        "the full head; a head from `coral train-head` costs less, and `coral tune` writes the tree down"
    )


def _prompts(target: Target, rows: PreparedData | None) -> list[list[int]]:
    from coral.suites.prompts import Prompt, render
    from coral.tuning.prompts import PROMPTS

    if rows is None:
        return [render(target.tokenizer, Prompt("", "", (text,))) for text in PROMPTS]
    if not rows.held_out_prompts:
        raise CoralError("the data holds no held-out prompts; prepare it with --held-out above 0.")
    return rows.held_out_prompts


def _show(found: Tuned) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Predicted, without prefill; tree is TOP_K,MAX_DEPTH,NUM_NODES,MIN_GAIN")
    for column in ("tree", "tau", "draft steps", "nodes", "tokens/s", "speedup"):
        table.add_column(column, justify="left" if column == "tree" else "right")
    rows = {f"{one.budget}": one for one in found.candidates[:5]}
    rows[f"{found.default.budget} (built in)"] = found.default
    rows["plain"] = found.plain
    for name, one in rows.items():
        table.add_row(
            name,
            f"{one.tau:.2f}",
            f"{one.steps:.2f}",
            f"{one.nodes:.1f}",
            f"{one.tokens_per_second:.1f}",
            f"{one.speedup:.2f}x",
        )
    Console(width=100).print(table)
    fast, slow = found.decoded
    print(
        f"decoded with the best: {fast:.1f} tokens/s, plain {slow:.1f}; predicted {found.predicted:.2f}x, "
        f"achieved {found.achieved:.2f}x, deviation {found.deviation:+.0%}"
    )
    if abs(found.deviation) > 0.1:
        print("That is more than 10%: the machine was busy, perhaps. Tune again when it is not.")
    if found.achieved < 1:
        print("No tree pays here: plain decoding (--drafter plain) is faster than the best one.")
