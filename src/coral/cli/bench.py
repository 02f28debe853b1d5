"""`coral bench`: measure drafters on the same prompts; `coral bench compare`: say whether they differ."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coral.cli import options
from coral.errors import CoralError
from coral.progress import spinner

if TYPE_CHECKING:
    from coral.bench.settings import BenchConfig

bench = typer.Typer(invoke_without_command=True)

DEFAULT = "mt_bench,humaneval,gsm8k"
GATE = "follow_eval"


@bench.callback()
def _bench(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option(help="Directory for results.json, results.md and results.png. Required.")
    ] = None,
    target: options.Target = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            help="As for `coral generate`, perhaps with a name for the table, as NAME=DRAFTER; may be given "
            "again. Default without --target: the package's."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="mt_bench, humaneval, gsm8k, follow_eval, JSONL files (Spec-Bench's becomes its six suites) "
            "or prepared data (its held-out prompts), with commas between. Default: the first three."
        ),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            help="Also write the 224 instructions of follow_eval, or only these without --suite, and fail if "
            "an accelerated answer follows one that the plain answer does not, or the other way round.",
            metavar=GATE,
        ),
    ] = None,
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
        bool | None,
        typer.Option(
            help="Also run HF generate, HF prompt lookup and our n-gram. Default: where there is no --gate."
        ),
    ] = None,
    assistant: Annotated[
        str | None,
        typer.Option(
            help="A small causal LM of the target's vocabulary: also run HF assisted generation with it."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens written for each turn.", min=1)] = 128,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Instead, throughput with so many texts at once, e.g. 1,2,4,8: tokens a second of all of "
            "them, plain and with each drafter.",
            metavar="N,N,...",
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Write on behind end tokens, so that turns are equally long.")
    ] = False,
    backend: options.Backend = "auto",
    head: options.Head = "auto",
    fallback: options.Fallback = False,
    tree: options.Tree = None,
    note: Annotated[str, typer.Option(help="Printed under the table.")] = "",
    seed: options.Seed = 0,
    device: options.Device = None,
) -> None:
    """Compare plain decoding, drafters and peers on the same prompts; rows say whether the text is equal."""
    if context.invoked_subcommand is not None:
        return
    if output is None:  # not for typer to ask for: the commands below need none
        raise CoralError("missing option '--output'; see `coral bench --help`.")
    if gate not in (None, GATE):
        raise CoralError(f"there is no gate {gate!r}; there is {GATE}.")
    with spinner("Loading"):
        from coral.bench.gate import failures
        from coral.bench.report import report
        from coral.bench.run import bench as run
        from coral.bench.settings import BenchConfig
        from coral.target import default as models

    drafters = options.read_drafters(drafter or [])
    if target is None and not drafters:
        own = str(models.DRAFTER)
        drafters = {"coral": own, "coral+ngram": f"{own}+ngram"}
    if gate is not None and not peers and not drafters.keys() - {"plain"}:
        raise CoralError("a gate compares drafters with plain decoding; name one with --drafter.")
    options.quiet_transformers()
    config = BenchConfig(
        limit=limit,
        deepen=deepen,
        dtypes=tuple(dtype or ("auto",)),
        temperatures=tuple(temperature or (0.0,)),
        coupled=(True, False) if uncoupled else (True,),
        max_new_tokens=max_new_tokens,
        tree_size=options.read_tree_size(tree),
        peers=gate is None if peers is None else peers,
        assistant=assistant,
        backend=backend,
        head=head,
        fallback=fallback,
        ignore_eos=ignore_eos,
        seed=seed,
        device=device,
        note=note,
    )
    suites = [name for name in (suite, gate) if name is not None] or [DEFAULT]
    if batch is not None:
        _batched(target, drafters, ",".join(suites), batch, output, config)
        return
    results = run(target, drafters, ",".join(suites), output, config)
    report(results)
    if gate is not None and (broken := failures(results)):
        print(f"The gate {gate} does not hold: {'; '.join(broken)}.", file=sys.stderr)
        raise typer.Exit(1)


def _batched(
    target: str | None, drafters: dict[str, str], suites: str, batch: str, output: Path, config: BenchConfig
) -> None:
    """Measure throughput, and print its table."""
    from rich.console import Console
    from rich.markdown import Markdown

    from coral.bench.batched import bench_batched
    from coral.bench.run import load_target
    from coral.drafters.drafting import Drafting

    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", batch):
        raise CoralError(f"--batch {batch!r} is no list of sizes; name them as in --batch 1,2,4,8.")
    options_ = {"head": config.head, "tree": config.tree_size}
    read = {name: Drafting.parse(source, **options_).located() for name, source in drafters.items()}
    loaded = load_target(target, config.dtypes[0], config.device)
    path = bench_batched(loaded, read, suites, [*map(int, batch.split(","))], output, config)
    Console(width=180).print(Markdown(path.with_suffix(".md").read_text(encoding="utf-8")))


@bench.command()
def compare(
    first: Annotated[
        str, typer.Argument(help="Drafter name; several (seeds of one recipe) with commas.", metavar="FIRST")
    ],
    second: Annotated[str, typer.Argument(help="The one, or those, to compare it with.", metavar="SECOND")],
    runs: Annotated[list[Path], typer.Argument(help="What `coral bench --output` named.", metavar="RUN...")],
) -> None:
    """Say whether FIRST accepts more than SECOND: difference of tau, with a 95% interval over prompts."""
    from coral.bench.compare import compare as run
    from coral.bench.compare import line
    from coral.bench.log import read

    for difference in run(first.split(","), second.split(","), [read(directory) for directory in runs]):
        print(line(difference, first, second))
