"""The command line: thin, and it imports what a command needs only when the command runs."""

from __future__ import annotations

import gc
import io
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from coral.cli import options
from coral.cli.bench import bench
from coral.cli.data import data
from coral.cli.export import export, import_
from coral.cli.gguf import cache, convert
from coral.cli.hub import push
from coral.cli.serve import serve
from coral.cli.train_head import train_head
from coral.cli.tune import expect, tune
from coral.errors import CoralError
from coral.native.memory import keep_freed_memory, seconds_alive, uncollected
from coral.progress import spinner

_LONG = 300.0
"""Seconds of training after which what was gained is worth half a minute of measuring."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long option names
    help="Make a Hugging Face LLM write faster without changing a word of its output.",
)


@app.callback()
def _app(
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Default: all cores that the process may use.", min=1)
    ] = None,
) -> None:
    keep_freed_memory()
    if threads is not None:  # torch reads it when it is imported, which no module above does
        os.environ["OMP_NUM_THREADS"] = str(threads)


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to answer. Without one: interactive chat.")
    ] = None,
    target: options.Target = None,
    drafter: options.Drafter = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest ids that make up this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest ids; 0 keeps all.")] = 0,
    seed: options.Seed = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string; may be given again.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Use the chat template, or go on with the text.")
    ] = True,
    stats: Annotated[
        bool, typer.Option("--stats", help="Then print times, speed and acceptance length.")
    ] = False,
    mark: Annotated[bool, typer.Option("--mark", help="Underline accepted draft tokens.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    tree: options.Tree = None,
    backend: options.Backend = "auto",
    head: options.Head = "auto",
    coupled: options.Coupled = True,
    fallback: options.Fallback = True,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Write an answer, token by token. The text is the target's own; the drafter only makes it faster."""
    if prompt is not None and not prompt.strip():
        raise CoralError("the prompt is empty; write something to answer or to go on with.")
    if prompt is None and not chat:
        raise CoralError("--raw goes on with a text; give one as the prompt, or leave --raw out to chat.")
    with spinner("Loading"), uncollected():
        from coral.api import load
        from coral.cli import chat as chat_
        from coral.decoding.sampling import Sampling

        Sampling(temperature, top_k, top_p, seed)  # refuses what is out of range before any weight is read
        options.quiet_transformers()
        pair = load(
            target,
            drafter,
            dtype=dtype,
            device=device,
            tree=options.read_tree_size(tree),
            backend=backend,
            head=head,
            coupled=coupled,
            fallback=fallback,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    loaded = seconds_alive() if stats else None
    asked: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "stop": tuple(stop or ()),
    }
    if prompt is None:
        chat_.converse(pair, asked, loaded=loaded, mark=mark)
    else:
        chat_.answer(pair, prompt, {**asked, "chat": chat}, loaded=loaded, mark=mark)


@app.command()
def demo(
    max_new_tokens: Annotated[int, typer.Option(help="Tokens written for each prompt.", min=1)] = 64,
    dtype: options.Dtype = "auto",
    tree: options.Tree = None,
) -> None:
    """Show SmolLM2 with our drafter on six prompts: marked draft tokens, then the speed of three methods.

    They are Hugging Face's `generate`, plain decoding and CORAL. SmolLM2 is fetched once.
    """
    from coral.cli.demo import run

    run(max_new_tokens, dtype, options.read_tree_size(tree) if tree else None)


@app.command()
def train(
    data: options.Data,
    output: Annotated[Path, typer.Option(help="Drafter directory to write; a stopped run goes on there.")],
    target: options.Target = None,
    recipe: Annotated[
        str, typer.Option(help="coral, hass, eagle2, coral3, eagle3, or a YAML file of your own.")
    ] = "coral",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override an option of the recipe: group.key=value.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after this long, instead of limits.epochs.")
    ] = None,
    updates: Annotated[
        int | None, typer.Option(help="Stop after this many updates, instead of limits.epochs.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --output, if there is one.")] = True,
    tracker: Annotated[
        str | None, typer.Option(help="Also log to tensorboard, wandb, trackio, or all that are installed.")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    shard_target: Annotated[
        bool,
        typer.Option(
            "--shard-target",
            help="Spread the target over the processes of accelerate launch. The acceptance length is then "
            "not measured on the way.",
        ),
    ] = False,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Train a drafter for a target. Features are computed on the way, unless --data holds them.

    `accelerate launch -m coral train ...` trains in several processes, on one machine or more.
    """
    with spinner("Loading"):
        from coral.bench.acceptance import acceptance
        from coral.data import shards
        from coral.training import parallel
        from coral.training.loop import train as run
        from coral.training.recipe import load_recipe

    limits = {"minutes": minutes, "updates": updates}
    given = [f"limits.{name}={value}" for name, value in limits.items() if value is not None]
    instead = ["limits.epochs=null"] if given else []  # first, so that --set limits.epochs=3 still counts
    given += [f"reports.tracker={tracker}"] if tracker else []
    config = load_recipe(recipe, [*instead, *(set_ or ()), *given])
    rows = shards.load(data)
    device = parallel.join(device, device_map)
    # A target that is to be sharded goes to the devices layer by layer.
    place = None if shard_target else device
    loaded = options.load_target(
        target, dtype, place, revision, trust_remote_code, rows, device_map, reads_much=True
    )
    if shard_target:
        parallel.shard_target(loaded)
    prompts = [p for p in rows.held_out_prompts if len(p) < loaded.context_length - 64][:16]
    outcome = run(
        loaded,
        rows,
        output,
        config,
        acceptance=(lambda drafter: acceptance(loaded, drafter, prompts)) if prompts else None,
        resume=resume,
    )
    if not outcome.finished:
        raise typer.Exit(2)  # the loop has said so, and what to do
    if outcome.seconds >= _LONG and prompts and not shard_target and os.environ.get("RANK", "0") == "0":
        del loaded  # which may be in another dtype than that in which it decodes
        placed = target, dtype, place, revision, trust_remote_code, rows, device_map
        expect(options.load_target(*placed, to_write=True), output, prompts[:4])


# Help lists commands in this order.
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.command()(train_head)
app.command()(tune)
app.command()(serve)
app.command()(export)
app.command("import")(import_)
app.command()(push)
app.command()(convert)
app.command()(cache)


def main() -> None:
    """Run the command line: a user's mistake is one sentence on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a terminal without UTF-8 shows question marks, not a traceback
            stream.reconfigure(errors="replace")
    try:
        _main()
    finally:
        gc.unfreeze()  # what `uncollected` set aside is taken down in order


def _main() -> None:
    if "--debug" in sys.argv:  # developers want the traceback
        sys.argv.remove("--debug")
        app()
        return
    try:
        code = app(prog_name="coral", standalone_mode=False)
        if code == 130:  # what newer versions of typer make of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except CoralError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped, with nothing left half-written; run the same command to go on or to start again.")
    except OSError as error:  # a full disk or a lost permission, wherever it strikes
        reason = f"{error.filename or 'a file'}: {error.strerror or error}"
        _fail(f"the system refuses {reason}; check the path, its permissions and the free space.")
    except Exception as error:
        # A mistake in the command line: click's exceptions, from whichever copy of click this typer uses.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())  # the help
            sys.exit(2)
        context = getattr(error, "ctx", None)
        hint = ""
        option = getattr(error, "option_name", None)
        if type(error).__name__ == "NoSuchOption" and any(
            word.startswith(str(option)) and (" " in word or word[:2] != "--") for word in sys.argv
        ):
            hint = "write -- before a prompt that begins with a dash; "
        what = error.format_message().replace(". Did", ", did").rstrip(".?\n")
        _fail(
            f"{what[:1].lower()}{what[1:]}; {hint}see "
            f"`{context.command_path if context else 'coral'} --help`."
        )


def _fail(message: str) -> NoReturn:
    if int(os.environ.get("RANK", 0)):
        # What all processes have to say the first one says; its end ends this one meanwhile.
        time.sleep(3)
    print(f"coral: {message}", file=sys.stderr)
    sys.exit(2)
