"""`coral data ...`: from conversations to training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coral import options

data = typer.Typer(no_args_is_help=True, help="Turn conversations into training data.")


@data.command()
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="JSONL files of conversations, .gz too.")],
    tokenizer: Annotated[str, typer.Option(help="The target (or its tokenizer): a directory or hub id.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    max_length: Annotated[int, typer.Option(help="Cut (or pack) rows at this many tokens.", min=8)] = 2048,
    pack: Annotated[
        bool, typer.Option("--pack", help="Put whole conversations together into rows of --max-length.")
    ] = False,
    held_out: Annotated[
        int, typer.Option(help="Opening prompts to set aside, never trained on.", min=0)
    ] = 60,
    limit: Annotated[
        int | None, typer.Option(help="This many conversations, drawn from all sources.")
    ] = None,
    last_turn_only: Annotated[
        bool,
        typer.Option(
            "--last-turn-only", help="Train on last answers only, for templates that rewrite history."
        ),
    ] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Only show examples, with trained text in colour.")
    ] = False,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Render conversations through the chat template and mark what the target is to write."""
    from rich.console import Console

    from coral.data import prepared
    from coral.data.preview import preview_sources

    options.quiet_transformers()
    loaded = options.read_tokenizer(tokenizer, revision, trust_remote_code)
    if preview:
        preview_sources(sources, loaded, Console(), last_turn_only=last_turn_only)
        return
    info = prepared.prepare(
        sources,
        loaded,
        output,
        max_length=max_length,
        pack=pack,
        held_out=held_out,
        seed=seed,
        limit=limit,
        last_turn_only=last_turn_only,
        console=Console(stderr=True),
    )
    print(prepared.report(info))


@data.command()
def regenerate(
    sources: Annotated[list[Path], typer.Argument(help="JSONL files of conversations or prompts, .gz too.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write; a stopped run goes on there.")],
    target: options.Target = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Records take these in turn. Default: 0 and 0.8, half each.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    batch_size: Annotated[int, typer.Option(help="Conversations answered at once.", min=1)] = 64,
    limit: Annotated[
        int | None, typer.Option(help="This many conversations, drawn from all sources.")
    ] = None,
    max_turns: Annotated[int | None, typer.Option(help="Answer only the first N user turns.")] = None,
    keep_unfinished: Annotated[
        bool, typer.Option("--keep-unfinished/--drop-unfinished", help="Keep answers that were cut.")
    ] = True,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Let the target write the answers itself: a drafter learns best from its own target's text."""
    from rich.console import Console

    from coral.data.regenerate import regenerate as run
    from coral.decoding.batch import write
    from coral.decoding.sampling import Sampling

    loaded = options.load_target(target, dtype, device, revision, trust_remote_code)

    def answer(prompts: list[list[int]], temperatures: list[float], ids: list[int]) -> list[list[int]]:
        return write(loaded, prompts, [Sampling(t, seed=seed) for t in temperatures], ids, max_new_tokens)

    assert loaded.tokenizer is not None  # it was loaded from a directory or the hub
    result = run(
        sources,
        output,
        loaded.tokenizer,
        answer,
        context_length=loaded.context_length,
        max_new_tokens=max_new_tokens,
        temperatures=temperature or (0.0, 0.8),
        batch_size=batch_size,
        seed=seed,
        limit=limit,
        max_turns=max_turns,
        keep_unfinished=keep_unfinished,
        console=Console(stderr=True),
    )
    print(result)


@data.command()
def features(
    data: Annotated[Path, typer.Argument(help="Directory that `coral data prepare` wrote.")],
    output: Annotated[Path, typer.Option(help="Directory to write; a stopped run goes on there.")],
    target: options.Target = None,
    store: Annotated[str, typer.Option(help="Stored as bfloat16 or float32.")] = "bfloat16",
    shard_rows: Annotated[int, typer.Option(help="Rows in a file.", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows that the target reads at once.", min=1)] = 8,
    shard: Annotated[
        str, typer.Option(help="I/N: of N processes that write into one directory, this is number I.")
    ] = "1/1",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Store the target's features of prepared data: many runs then train without running the target."""
    from rich.console import Console

    from coral.data import prepared, shards

    rows = prepared.load(data)
    loaded = options.load_target(target, dtype, device, revision, trust_remote_code, rows)
    stored = shards.store(
        loaded,
        rows,
        output,
        dtype=store,
        shard_rows=shard_rows,
        batch_size=batch_size,
        part=options.read_part(shard),
        console=Console(stderr=True),
    )
    print(f"features of {len(stored):,} rows in {stored.num_shards:,} shards: {output}")
