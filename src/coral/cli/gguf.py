"""`coral convert` and `coral cache`: GGUF files as plain directories, and those that are kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from coral.cli import options
from coral.errors import CoralError
from coral.progress import spinner


def convert(
    source: Annotated[
        str,
        typer.Argument(help="FILE.gguf, a directory that holds one, ORG/REPO:QUANT or ORG/REPO/FILE.gguf."),
    ],
    output: Annotated[Path, typer.Argument(help="Directory to write: new or empty.")],
    dtype: Annotated[str, typer.Option(help="auto (bfloat16), bfloat16, float32 or float16.")] = "auto",
    revision: options.Revision = None,
) -> None:
    """Write a GGUF file as a plain Hugging Face directory. In float32 its values are kept exactly."""
    with spinner("Loading"):
        from rich.console import Console

        from coral.target.gguf import names
        from coral.target.gguf.convert import convert as run

    options.quiet_transformers()
    if (paths := names.find(source, revision)) is None:
        raise CoralError(f"{source} names no GGUF file; name FILE.gguf or ORG/REPO:QUANT.")
    run(paths, output, dtype, Console(stderr=True))
    print(f"converted {', '.join(path.name for path in paths)}: {output}")


def cache(
    entries: Annotated[
        list[str] | None, typer.Argument(help="Names of entries, for --clear. Default: all.")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete them; they are made again when needed.")
    ] = False,
) -> None:
    """List what is kept, or delete it: GGUF files that were converted for use as targets, and what rows cost
    on this machine.
    """
    from coral.decoding import row_costs
    from coral.target import second_start
    from coral.target.gguf import cache as kept

    found = kept.entries()
    if unknown := set(entries or ()) - {entry.path.name for entry in found}:
        raise CoralError(f"the cache holds no entry {min(unknown)}; `coral cache` lists them.")
    if entries and not clear:
        raise CoralError("entries are named for --clear only; leave them out to list all.")
    for entry in found:
        if not clear:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
            print(f"{entry.path.name}  {entry.size / 1e9:6.2f} GB  last used {used}  {entry.source}")
        elif not entries or entry.path.name in entries:
            kept.remove(entry)
            print(f"deleted {entry.path.name}: {entry.size / 1e9:.2f} GB, {entry.source}")
    if clear and not entries:
        second_start.clear()
        row_costs.clear()
    total = sum(entry.size for entry in found)
    if not clear:
        print(f"{total / 1e9:.2f} GB of at most {kept.bound() / 1e9:g} (CORAL_CACHE_GB) in {kept.root()}")
        for costs in row_costs.entries():
            shown = ", ".join(f"{rows}: {1000 * seconds:.3g}" for rows, seconds in costs.seconds.items())
            print(f"milliseconds by rows, {costs.name}: {shown}")
