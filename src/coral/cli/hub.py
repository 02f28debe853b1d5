"""`coral push`: put a drafter on the Hugging Face hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coral.errors import CoralError
from coral.progress import spinner


def push(
    drafter: Annotated[Path, typer.Argument(help="Drafter directory.")],
    repo_id: Annotated[str, typer.Argument(help="Where to put it: OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; made if it is not there. Default: main.")
    ] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload drafter",
    license: Annotated[
        str | None, typer.Option(help="Licence of the drafter, as the hub names it: apache-2.0, for example.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the target, for a drafter that was trained on a directory.")
    ] = None,
    data_note: Annotated[str | None, typer.Option(help="A sentence on the training data.")] = None,
    bench: Annotated[
        Path | None, typer.Option(help="What `coral bench --output` named: its tables go into the card.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the model card and push nothing.")
    ] = False,
) -> None:
    """Push a drafter with its heads, its tuned trees and a model card, in one commit.

    The card is written from what the drafter records. To write your own, put what --dry-run prints into
    DRAFTER/README.md and edit it there: a card in the directory is pushed as it is.
    """
    with spinner("Loading"):
        from coral.drafters import checkpoint
        from coral.hub import repository as hub
        from coral.hub.card import card

    recorded = checkpoint.read_config(drafter)["target"]
    files = hub.parts(drafter)
    told = {"--license": license, "--base-model": base_model, "--data-note": data_note, "--bench": bench}
    if (drafter / hub.CARD).exists():
        if given := [name for name, value in told.items() if value is not None]:
            raise CoralError(
                f"{drafter / hub.CARD} is the card, so {' and '.join(given)} would change nothing; write it "
                "into that file, or delete the file."
            )
        try:
            text = (drafter / hub.CARD).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CoralError(f"{drafter / hub.CARD} is not UTF-8 ({error.reason}); write it anew.") from error
    else:
        tables = None if bench is None else _tables(bench)
        text = card(drafter, repo_id, license=license, target=base_model, data=data_note, bench=tables)
        if recorded["revision"] is None and base_model is None:
            print(
                f"note: the drafter's target is {recorded['name']}, which is not known to be on the hub; say "
                "which model it is with --base-model",
                file=sys.stderr,
            )
    if dry_run:
        print(text, end="")
        print(f"would be pushed to {repo_id}: {', '.join([*files, hub.CARD])}", file=sys.stderr)
        return
    commit, url = hub.push(drafter, repo_id, text, private=private, revision=revision, message=message)
    print(f"pushed {len(files) + 1} files: {url}")
    print(f"use it as --drafter {repo_id}, or for good as --drafter {repo_id}@{commit}")


def _tables(bench: Path) -> str:
    from coral.bench.report import markdown
    from coral.bench.results import read

    return markdown(read(bench / "results.json"))
