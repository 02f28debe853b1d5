"""`coral data ...`: from conversations to training data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coral.cli import options
from coral.errors import CoralError
from coral.progress import spinner

if TYPE_CHECKING:
    from coral.data.jobs import Answer
    from coral.target.target import Target

data = typer.Typer(no_args_is_help=True, help="Turn conversations into training data.")

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Files of conversations (.jsonl, .json, .parquet), directories of them, or "
        "hub:ORG/NAME[/CONFIG][@REVISION][:SPLIT], which is streamed."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="This many conversations, drawn evenly from all that the sources hold: they are read to their "
        "end once, and those drawn stand in memory."
    ),
]


@data.command()
def prepare(
    sources: Sources,
    tokenizer: Annotated[str, typer.Option(help="The target (or its tokenizer): a directory or hub id.")],
    output: Annotated[
        Path | None, typer.Option(help="Directory to write. Required, except with --preview.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Cut (or pack) rows at this many tokens.", min=8)] = 2048,
    pack: Annotated[
        bool, typer.Option("--pack", help="Put whole conversations together into rows of --max-length.")
    ] = False,
    held_out: Annotated[
        int, typer.Option(help="Opening prompts to set aside, never trained on.", min=0)
    ] = 60,
    limit: Limit = None,
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
    with spinner("Loading"):
        from rich.console import Console

        from coral.data.prepare import PrepareConfig
        from coral.data.prepare import prepare as run
        from coral.data.prepared import report
        from coral.data.preview import preview_sources

    if output is None and not preview:
        raise CoralError("missing option '--output'; see `coral data prepare --help`.")
    options.quiet_transformers()
    loaded = options.read_tokenizer(tokenizer, revision, trust_remote_code)
    if preview:
        preview_sources(sources, loaded, Console(), last_turn_only=last_turn_only)
        return
    assert output is not None
    config = PrepareConfig(max_length, pack, held_out, seed, limit, last_turn_only)
    print(report(run(sources, loaded, output, config, console=Console(stderr=True))))


@data.command()
def regenerate(
    sources: Sources,
    output: Annotated[Path, typer.Option(help="JSONL file to write; a stopped run goes on there.")],
    target: options.Target = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Records take these in turn. Default: 0 and 0.8, half each.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    batch_size: Annotated[
        int, typer.Option(help="Conversations answered at once, without --endpoint.", min=1)
    ] = 64,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="Base address of an OpenAI-compatible server that answers instead (vLLM, SGLang), as "
            "http://localhost:8000/v1; may be given again, servers share the work."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its name there. Default: the only one that is served.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way, over all endpoints.", min=1)] = 64,
    retries: Annotated[int, typer.Option(help="Tries of a request after the first.", min=0)] = 5,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.", min=0.01)] = 600.0,
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable with the API key, if there is one.")
    ] = "OPENAI_API_KEY",
    limit: Limit = None,
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
    """Let the target write the answers itself: a drafter learns best from its own target's text.

    Beside OUTPUT.jsonl stand OUTPUT.account.json, where every record went, and OUTPUT.failed.jsonl.
    """
    with spinner("Loading"):
        from rich.console import Console

        from coral.data.regenerate import regenerate as run
        from coral.decoding.sampling import Sampling

    for each in temperature or ():
        Sampling(each)  # refuses what is out of range before anything is asked
    console = Console(stderr=True)
    settings: dict[str, Any] = {"seed": seed, "max_new_tokens": max_new_tokens}
    servers = None
    if endpoint:
        from coral.data.endpoint import answer_over_http, connect

        if target is not None:
            raise CoralError("--target and --endpoint exclude each other; the endpoint runs its own model.")
        servers = connect(
            endpoint,
            model,
            api_key=os.environ.get(api_key_env),
            console=console,
            concurrency=concurrency,
            retries=retries,
            timeout=timeout,
        )
        settings["model"] = servers.model
        answer = answer_over_http(
            servers, max_new_tokens=max_new_tokens, seed=seed, keep_unfinished=keep_unfinished
        )
    else:
        loaded = options.load_target(target, dtype, device, revision, trust_remote_code)
        answer = _written_by(loaded, max_new_tokens, batch_size, seed, keep_unfinished)
    result = run(
        sources,
        output,
        answer,
        settings=settings,
        temperatures=temperature or (0.0, 0.8),
        limit=limit,
        max_turns=max_turns,
        console=console,
    )
    print(result)
    if servers:
        servers.refuse_dead()


def _written_by(
    target: Target, max_new_tokens: int, batch_size: int, seed: int, keep_unfinished: bool
) -> Answer:
    """Answers of a target in this process, natively where it can be run so."""
    from coral.data.batches import Turns, answer_packed, answer_padded
    from coral.decoding.batch import write_padded
    from coral.decoding.plain import Plain
    from coral.decoding.sampling import Sampling
    from coral.decoding.state import State
    from coral.native import sampler
    from coral.serving.engine import Engine
    from coral.tree import DEFAULT

    assert target.tokenizer is not None  # it was loaded from a directory or the hub
    turns = Turns(
        target.tokenizer,
        context_length=target.context_length,
        max_new_tokens=max_new_tokens,
        keep_unfinished=keep_unfinished,
    )
    native = target.on()
    if native.backend != "native":

        def write(prompts: list[list[int]], temperatures: list[float], ids: list[int]) -> list[list[int]]:
            if target.device.type == "cpu":
                sampler.load()  # which may build it, so not before there is something to write
            samplings = [Sampling(t, seed=seed) for t in temperatures]
            return write_padded(target, prompts, samplings, ids, max_new_tokens)

        return answer_padded(turns, write, batch_size)

    def begin(prompt: list[int], temperature: float, sequence_id: int) -> State:
        drawn = Sampling(temperature, seed=seed)
        return State.begin(
            native, prompt, max_new_tokens, sampling=drawn, sequence_id=sequence_id, eos_ids=native.eos_ids
        )

    return answer_packed(turns, begin, Engine(native, Plain(), DEFAULT, batch_size).write)


@data.command()
def features(
    data: Annotated[Path, typer.Argument(help="Directory that `coral data prepare` wrote.")],
    output: Annotated[Path, typer.Option(help="Directory to write; a stopped run goes on there.")],
    target: options.Target = None,
    layers: Annotated[
        str,
        typer.Option(
            help="Store what enters these layers of the target, too, for example 2,15,27, as drafters of "
            "kind eagle3 read it. Each needs as much disk as the features."
        ),
    ] = "",
    store: Annotated[
        str, typer.Option(help="Stored as bfloat16, float32 or fp8 (half the disk).")
    ] = "bfloat16",
    shard_rows: Annotated[int, typer.Option(help="Rows in a file.", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows that the target reads at once.", min=1)] = 8,
    shard: Annotated[
        str,
        typer.Option(
            help="I/N: of N processes this is number I; they write into one directory, or each into its own "
            "beside the others', and train reads the one above."
        ),
    ] = "1/1",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Store the target's features of prepared data: many runs then train without running the target."""
    with spinner("Loading"):
        from rich.console import Console

        from coral.data import prepared
        from coral.data.shards import Form
        from coral.data.write_shards import store as run

    rows = prepared.load(data)
    loaded = options.load_target(target, dtype, device, revision, trust_remote_code, rows, reads_much=True)
    stored = run(
        loaded,
        rows,
        output,
        Form(store, shard_rows, options.read_layers(layers, loaded)),
        batch_size=batch_size,
        part=options.read_part(shard),
        console=Console(stderr=True),
    )
    print(f"features of {len(stored):,} rows in {stored.num_shards:,} shards: {output}")
