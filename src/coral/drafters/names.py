"""What a drafter's name says: where it lies, its LM head, and whether lookup drafts beside it."""

from __future__ import annotations

from pathlib import Path

from coral.drafters import checkpoint
from coral.drafters.heads import store as heads


def read_name(drafter: str | Path | None, head: str = "auto") -> tuple[str | Path | None, str, bool]:
    """What `drafter` names: its directory or hub id, if any, its head, and whether lookup shares the tree.

    None or "plain" is plain decoding, "ngram" lookup alone. Behind a directory or hub id stand "+ngram" for
    both in one tree, and "+full", "+routed" and so on for one of its heads instead of `head`.
    """
    if drafter in (None, "plain", "ngram"):
        return None, head, drafter == "ngram"
    lookup = False
    while isinstance(drafter, str):
        source, _, last = drafter.rpartition("+")
        if not source or last not in ("ngram", *heads.HEADS):
            break
        drafter, lookup = source, lookup or last == "ngram"
        head = head if last == "ngram" else last
    return drafter, head, lookup


def located(drafter: str, head: str = "auto") -> str:
    """A drafter's name with its local directory in place of a hub id. The hub is asked once, so what is read
    afterwards is of one revision.

    Raises:
        CoralError: no such drafter or head.
    """
    source, head, _ = read_name(drafter, head)
    if source is None:
        return drafter
    directory = checkpoint.locate(source)
    heads.resolve(directory, head)
    return str(directory) + drafter.removeprefix(str(source))
