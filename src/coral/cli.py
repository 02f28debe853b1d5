"""The command line: thin, and it imports what a command needs only when the command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coral.errors import CoralError

if TYPE_CHECKING:
    pass

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a Hugging Face LLM write faster without changing a word of its output.",
)
data = typer.Typer(no_args_is_help=True, help="Turn conversations into training data.")
app.add_typer(data, name="data")

TargetOption = Annotated[
    str | None, typer.Option(help="Target: a directory or hub id. Default: the pair that the package ships.")
]
DrafterOption = Annotated[
    str | None, typer.Option(help="Drafter: a directory, a hub id, or 'ngram'. Default: plain decoding.")
]
DtypeOption = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(help="Device, for example cuda. Default: where it fits.")]
TreeOption = Annotated[
    str | None,
    typer.Option(
        "--tree", help="Draft tree as TOP_K,MAX_DEPTH,NUM_NODES. Larger trees accept more and cost more."
    ),
]
CoupledOption = Annotated[
    bool, typer.Option(help="At temperature > 0, draft with the noise that the sampler will use.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Revision of the target on the hub.")]
TrustOption = Annotated[bool, typer.Option(help="Run code that comes with the target.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]


@app.callback()
def _app(
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.", min=1)] = None,
) -> None:
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to answer. Without one: interactive chat.")
    ] = None,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest ids that make up this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest ids; 0 keeps all.")] = 0,
    seed: SeedOption = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string; may be given again.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Use the chat template, or go on with the text.")
    ] = True,
    stats: Annotated[bool, typer.Option(help="Print acceptance length and speed afterwards.")] = False,
    mark: Annotated[bool, typer.Option(help="Underline tokens that were drafted and accepted.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    tree: TreeOption = None,
    coupled: CoupledOption = True,
    revision: RevisionOption = None,
    drafter_revision: Annotated[str | None, typer.Option(help="Revision of the drafter on the hub.")] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write an answer, token by token. The text is the target's own; the drafter only makes it faster."""
    from coral import chat as chat_
    from coral.api import load

    if prompt is not None and not prompt.strip():
        raise CoralError("the prompt is empty; write something to answer or to go on with.")
    pair = load(
        target,
        drafter,
        dtype=dtype,
        device=device,
        budget=_budget(tree),
        coupled=coupled,
        revision=revision,
        drafter_revision=drafter_revision,
        trust_remote_code=trust_remote_code,
    )
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "stop": tuple(stop or ()),
    }
    if prompt is None:
        chat_.converse(pair, options, stats=stats, mark=mark)
    else:
        chat_.answer(pair, prompt, {**options, "chat": chat}, stats=stats, mark=mark)


@app.command()
def demo(
    deepen: Annotated[
        int, typer.Option(help="Layers of the deepened target; 0 shows the target as it is.")
    ] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens written for each prompt.")] = 64,
    dtype: DtypeOption = "float32",
    tree: TreeOption = None,
) -> None:
    """Show the shipped pair at work on six prompts: text with its draft tokens marked, then plain against CORAL."""
    from coral.demo import run

    run(deepen, max_new_tokens, dtype, _budget(tree))


@data.command()
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="JSONL files of conversations, .gz too.")],
    tokenizer: Annotated[str, typer.Option(help="The target (or its tokenizer): a directory or hub id.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    max_length: Annotated[int, typer.Option(help="Cut (or pack) rows at this many tokens.", min=8)] = 2048,
    pack: Annotated[
        bool, typer.Option(help="Put whole conversations together into rows of --max-length.")
    ] = False,
    held_out: Annotated[
        int, typer.Option(help="Opening prompts to set aside, never trained on.", min=0)
    ] = 60,
    limit: Annotated[
        int | None, typer.Option(help="This many conversations, drawn from all sources.")
    ] = None,
    last_turn_only: Annotated[
        bool, typer.Option(help="Train on the last answer only (for templates that rewrite history).")
    ] = False,
    preview: Annotated[bool, typer.Option(help="Only show examples: what is trained on in colour.")] = False,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Render conversations through the chat template and mark what the target is to write."""
    from rich.console import Console

    from coral.data import prepared
    from coral.data.preview import preview_sources

    loaded = _tokenizer(tokenizer, revision, trust_remote_code)
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
    target: TargetOption = None,
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
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Let the target write the answers itself: a drafter learns best from its own target's text."""
    from rich.console import Console

    from coral.api import EMBEDDED
    from coral.data.regenerate import regenerate as run
    from coral.decoding.batch import write
    from coral.decoding.sampling import Sampling
    from coral.target import Target

    loaded = Target.load(
        target or EMBEDDED / "target",
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )

    def answer(prompts: list[list[int]], temperatures: list[float], ids: list[int]) -> list[list[int]]:
        return write(loaded, prompts, [Sampling(t, seed=seed) for t in temperatures], ids, max_new_tokens)

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


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Directory that `coral data prepare` wrote.")],
    output: Annotated[Path, typer.Option(help="Drafter directory to write; a stopped run goes on there.")],
    target: TargetOption = None,
    recipe: Annotated[str, typer.Option(help="coral, hass, eagle2, or a YAML file of your own.")] = "coral",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override an option of the recipe: group.key=value.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this long (sets limits.minutes).")] = None,
    updates: Annotated[
        int | None, typer.Option(help="Stop after this many updates (sets limits.updates).")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --output, if there is one.")] = True,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Train a drafter for a target. Features are computed on the way; nothing is stored but the drafter."""
    from coral.api import EMBEDDED
    from coral.data import prepared
    from coral.decoding.measure import acceptance
    from coral.target import Target
    from coral.training.loop import train as run
    from coral.training.recipe import load_recipe

    limits = {"minutes": minutes, "updates": updates}
    given = [f"limits.{name}={value}" for name, value in limits.items() if value is not None]
    config = load_recipe(recipe, [*(set_ or ()), *given])
    rows = prepared.load(data)
    loaded = Target.load(
        target or EMBEDDED / "target",
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    prepared.check(rows.info, loaded.vocab_size, loaded.tokenizer)
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
        raise CoralError(f"stopped at update {outcome.update}; run the same command to go on.")


@app.command()
def bench(
    output: Annotated[Path, typer.Option(help="Directory for results.json, table.md and plot.png.")],
    target: TargetOption = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR; may be given again. Default with the shipped pair: its own."),
    ] = None,
    suite: Annotated[
        str, typer.Option(help="mt_bench, humaneval, gsm8k or paths to JSONL files, with commas between.")
    ] = "mt_bench,humaneval,gsm8k",
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts of each suite.", min=1)] = None,
    deepen: Annotated[
        int | None,
        typer.Option(help="Append layers that change no output, up to N, for an LLM's cost ratio."),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be given again. Default: auto.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="May be given again. Default: 0.")] = None,
    uncoupled: Annotated[
        bool, typer.Option("--uncoupled", help="At temperature > 0, also measure uncoupled drafting.")
    ] = False,
    peers: Annotated[
        bool, typer.Option(help="Also run HF generate, HF prompt lookup and our n-gram.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens written for each turn.", min=1)] = 128,
    tree: TreeOption = None,
    note: Annotated[str, typer.Option(help="Printed under the table.")] = "",
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> None:
    """Compare plain decoding, drafters and peers on the same prompts; every row says whether the text is the same."""
    from coral.api import EMBEDDED
    from coral.bench.report import report
    from coral.bench.run import bench as run

    drafters: dict[str, str | Path] = {}
    for item in drafter or []:
        name, equals, source = item.partition("=")
        if not (name and equals and source):
            raise CoralError(f"cannot read --drafter {item!r}; write it as NAME=DIR.")
        drafters[name] = source
    if target is None and not drafters:
        drafters["coral"] = EMBEDDED / "drafter"
    results = run(
        target or EMBEDDED / "target",
        drafters,
        suite,
        output,
        limit=limit,
        deepen=deepen,
        dtypes=tuple(dtype or ("auto",)),
        temperatures=tuple(temperature or (0.0,)),
        coupled=(True, False) if uncoupled else (True,),
        max_new_tokens=max_new_tokens,
        budget=_budget(tree),
        peers=peers,
        seed=seed,
        device=device,
        note=note,
    )
    report(results)


def _budget(tree: str | None) -> Any:
    from coral.decoding.tree import Budget

    if tree is None:
        return Budget()
    try:
        top_k, max_depth, num_nodes = (int(part) for part in tree.split(","))
    except ValueError:
        raise CoralError(f"cannot read --tree {tree!r}; write it as TOP_K,MAX_DEPTH,NUM_NODES.") from None
    if min(top_k, num_nodes) < 1 or max_depth < 0:
        raise CoralError(f"--tree {tree!r} is out of range; TOP_K and NUM_NODES are at least 1, MAX_DEPTH 0.")
    return Budget(top_k, max_depth, num_nodes)


def _tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CoralError(f"cannot load a tokenizer from {source!r}: {str(error).splitlines()[0]}") from error


def main() -> None:
    """Run the command line: a user's mistake is one sentence on standard error and exit code 2."""
    if "--debug" in sys.argv:  # developers want the traceback
        sys.argv.remove("--debug")
        app()
        return
    try:
        app(standalone_mode=False)
    except CoralError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped; nothing half-written was left behind.")
    except Exception as error:
        import click

        if isinstance(error, click.ClickException):
            error.show()
            sys.exit(2)
        raise


def _fail(message: str) -> None:
    print(f"coral: {message}", file=sys.stderr)
    sys.exit(2)
