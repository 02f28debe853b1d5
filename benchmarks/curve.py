"""Tau over minutes and trained tokens of a training run, on held-out prompts.

    python benchmarks/curve.py OUTPUT DATA CHECKPOINT... [--prompts 24] [--target DIR]

CHECKPOINT: copies of a run's output directory, made on the way (`cp -r`), the run's end among them. Each
decodes the held-out prompts of DATA greedily, with a chain of four draft tokens and with a tree of 24. OUTPUT
gets results.json, results.md and curve.svg.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from coral.bench.acceptance import acceptance
from coral.data import shards
from coral.drafters import checkpoint
from coral.target import default as models
from coral.target.target import Target


def measured(target: Target, directory: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """A checkpoint's place in its run, and its tau."""
    text = (directory / "coral" / "training" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "trained_tokens_per_second" in line]
    tokens, before = 0.0, 0.0
    for line in lines:
        tokens += line["trained_tokens_per_second"] * (line["seconds"] - before)
        before = line["seconds"]
    drafter = checkpoint.load(directory, target).to(target.dtype).eval()
    with torch.no_grad():
        taus = acceptance(target, drafter, prompts)
    return {
        "minutes": round(lines[-1]["seconds"] / 60, 1),
        "trained_tokens": round(tokens),
        "update": lines[-1]["update"],
        **{name: round(tau, 3) for name, tau in taus.items()},
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for name, label in (("tree", "tree of 24"), ("chain", "chain of 4")):
        axes.plot([row["minutes"] for row in rows], [row[name] for row in rows], marker="o", label=label)
    axes.set(xlabel="minutes of training", ylabel="tau on held-out prompts", xlim=(0, None), ylim=(1, None))
    above = axes.secondary_xaxis("top", functions=_to_tokens(rows))
    above.set_xlabel("million trained tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _to_tokens(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Minutes to million tokens at the run's mean speed, and back."""
    speed = rows[-1]["trained_tokens"] / rows[-1]["minutes"] / 1e6
    return (lambda minutes: minutes * speed), (lambda tokens: tokens / speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--target")
    options = parser.parse_args()
    target = models.load() if options.target is None else Target.load(options.target)
    prompts = shards.load(options.data).held_out_prompts[: options.prompts]
    rows = []
    for directory in options.checkpoints:
        rows.append(measured(target, directory, prompts))
        print(rows[-1], flush=True)
    rows.sort(key=lambda row: row["minutes"])
    options.output.mkdir(parents=True, exist_ok=True)
    shown = {"target": target.name, "prompts": len(prompts), "threads": torch.get_num_threads(), "rows": rows}
    (options.output / "results.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    table = [
        "| minutes | trained tokens | updates | tau, chain of 4 | tau, tree of 24 |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = f"{row['minutes']:g} | {row['trained_tokens']:,} | {row['update']:,}"
        table.append(f"| {sizes} | {row['chain']:.2f} | {row['tree']:.2f} |")
    (options.output / "results.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    plot(rows, options.output / "curve.svg")


if __name__ == "__main__":
    main()
