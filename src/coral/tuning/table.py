"""What tuning found, as a person reads it."""

from __future__ import annotations

from rich.table import Table

from coral.tuning.search import Tuned


def table(found: Tuned) -> Table:
    """The fastest trees, the built-in one and plain decoding, as predicted."""
    made = Table(title="Predicted, without prefill; tree is TOP_K,MAX_DEPTH,NUM_NODES,MIN_GAIN")
    for column in ("tree", "tau", "draft steps", "nodes", "tokens/s", "speedup"):
        made.add_column(column, justify="left" if column == "tree" else "right")
    rows = {f"{one.tree_size}": one for one in found.candidates[:5]}
    rows[f"{found.default.tree_size} (built in)"] = found.default
    rows["plain"] = found.plain
    for name, one in rows.items():
        made.add_row(
            name,
            f"{one.tau:.2f}",
            f"{one.steps:.2f}",
            f"{one.nodes:.1f}",
            f"{one.tokens_per_second:.1f}",
            f"{one.speedup:.2f}x",
        )
    return made


def summary(found: Tuned) -> str:
    """What the fastest tree achieved, and what to make of it."""
    fast, slow = found.decoded
    lines = [
        f"decoded with the best: {fast:.1f} tokens/s, plain {slow:.1f}; predicted {found.predicted:.2f}x, "
        f"achieved {found.achieved:.2f}x, deviation {found.deviation:+.0%}"
    ]
    if abs(found.deviation) > 0.1:
        lines.append("That is more than 10%: the machine was busy, perhaps. Tune again when it is not.")
    if found.achieved < 1:
        lines.append("No tree pays here: plain decoding (--drafter plain) is faster than the best one.")
    return "\n".join(lines)
