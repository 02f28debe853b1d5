"""What a level of the draft tree costs with each LM head: `python benchmarks/heads.py OUTPUT`.

Times `topk` of the full head and of routed heads (router included) on the shipped pair's LM head and on
random weights of the sizes of two LLMs. Cost does not depend on what the weights are; recall does, and
`coral bench` measures that. The heads take turns call by call, so that a slow moment of the machine hits all
of them, and each finds the caches as the other left them. Writes OUTPUT/results.json and
OUTPUT/results.md. Under four minutes on a quiet machine.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from coral.api import EMBEDDED
from coral.bench.environment import commit, environment
from coral.drafter.groups import contiguous
from coral.drafter.heads import FullHead, Head
from coral.drafter.routed import RoutedHead, Router
from coral.files import atomic_text
from coral.packed import pack_linears
from coral.target import Target

SIZES = {
    "the shipped pair": (32000, 256),
    "Llama-3-8B": (128256, 4096),
    "Qwen2.5-7B": (152064, 3584),
}
GROUPS = (8, 16, 32, 64)
FRACTIONS = (1 / 8, 1 / 4, 1 / 2)
# Nodes of a level and ids asked for: the root's, the others', and the others' when drafting is coupled.
CALLS = ((1, 4), (4, 4), (4, 256))
FEWEST, MOST = 5, 300  # calls of each head


def random_target(vocab_size: int, hidden_size: int, dtype: torch.dtype) -> Any:
    """What a head asks of a target."""
    with torch.device("meta"):
        linear = nn.Linear(hidden_size, vocab_size, bias=False)
    # In pieces: a float32 copy of the whole would not fit beside it.
    weight = torch.empty(vocab_size, hidden_size, dtype=dtype)
    for piece in weight.split(4096):
        piece.copy_(torch.randn(piece.shape) * hidden_size**-0.5)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    head = nn.Sequential(linear)
    pack_linears(head)
    return SimpleNamespace(head_weight=weight, head_bias=None, head=head)


@torch.inference_mode()
def time_heads(heads: dict[str, Head], hidden: int, rows: int, k: int, seconds: float, dtype: Any) -> dict:
    """Median seconds of `topk` by head; the heads take turns for about so long."""
    times: dict[str, list[float]] = {name: [] for name in heads}

    def turn() -> None:
        features, scores = torch.randn(rows, hidden).to(dtype), torch.randn(rows).clamp(max=0)
        for name, head in heads.items():
            begin = perf_counter()
            head.topk(features, k, [], scores)
            times[name].append(perf_counter() - begin)

    turn()
    for found in times.values():
        found.clear()  # the first call also packs
    end = perf_counter() + seconds
    count = 0
    while count < FEWEST or (count < MOST and perf_counter() < end):
        turn()
        count += 1
    return {name: median(found) for name, found in times.items()}


def measure(name: str, target: Any, seconds: float) -> list[dict[str, Any]]:
    """Rows of results for one target."""
    weight: Tensor = target.head_weight
    (vocab_size, hidden), dtype = weight.shape, weight.dtype
    size, found = weight.element_size(), []
    for groups in GROUPS:
        routed = RoutedHead(target, Router(hidden, groups), contiguous(vocab_size, groups), groups)
        heads: dict[str, Head] = {"full": FullHead(target)}
        for fraction in FRACTIONS:
            some = RoutedHead.__new__(RoutedHead)  # the same weights
            some.__dict__ = {**vars(routed), "active": round(fraction * groups)}
            heads[f"{some.active}"] = some
        for rows, k in CALLS:
            times = time_heads(heads, hidden, rows, k, seconds / len(GROUPS) / len(CALLS), dtype)
            for fraction, (label, taken) in zip((1.0, *FRACTIONS), times.items(), strict=True):
                is_full = label == "full"
                read = vocab_size * hidden if is_full else int(label) * routed.ids.shape[1] * hidden
                read += 0 if is_full else hidden * (hidden + groups)  # the router's own weights
                found.append(
                    {
                        "target": name,
                        "vocab_size": vocab_size,
                        "hidden_size": hidden,
                        "dtype": str(dtype).removeprefix("torch."),
                        "nodes": rows,
                        "k": k,
                        "head": "full" if is_full else "routed",
                        "groups": groups,
                        "active": groups if is_full else int(label),
                        "fraction": fraction,
                        "seconds": taken,
                        "speedup": times["full"] / taken,
                        "bytes": read * size,
                    }
                )
        del routed, heads, some
    return found


def markdown(results: dict[str, Any]) -> str:
    """A table for each target and dtype: one line for each number of groups and of active ones."""
    where, rows = results["environment"], results["rows"]
    lines = [
        f"Milliseconds of `topk` for one level of the draft tree (times faster than the full head). "
        f"{where['hardware']}, {where['threads']} threads, torch {where['torch']}.",
        "",
    ]
    for target, dtype in dict.fromkeys((row["target"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["target"], row["dtype"]) == (target, dtype)]
        calls = list(dict.fromkeys((row["nodes"], row["k"]) for row in mine))
        shape = f"{mine[0]['vocab_size']} x {mine[0]['hidden_size']}"
        heading = ["head", "MB read", *(f"{nodes} nodes, k = {k}" for nodes, k in calls)]
        lines += [
            f"**{target}, {shape}, {dtype}**",
            "",
            _line(heading),
            _line(["---", *["---:"] * (1 + len(calls))]),
        ]
        full = {call: median(r["seconds"] for r in mine if _is(r, "full", call)) for call in calls}
        read = next(row["bytes"] for row in mine if row["head"] == "full")
        cells = [f"{1000 * full[call]:.2f}" for call in calls]
        lines.append(_line(["full", f"{read / 1e6:.1f}", *cells]))
        routed = [row for row in mine if row["head"] == "routed"]
        for groups, active in dict.fromkeys((row["groups"], row["active"]) for row in routed):
            found = [row for row in routed if (row["groups"], row["active"]) == (groups, active)]
            cells = [f"{1000 * row['seconds']:.2f} ({row['speedup']:.1f}x)" for row in found]
            lines.append(_line([f"{active} of {groups} groups", f"{found[0]['bytes'] / 1e6:.1f}", *cells]))
        lines.append("")
    return "\n".join([*lines, f"Reproduce with `{results['command']}` at commit `{results['commit']}`.", ""])


def _is(row: dict[str, Any], head: str, call: tuple[int, int]) -> bool:
    return row["head"] == head and (row["nodes"], row["k"]) == call


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", nargs="*", help="V,h of random weights, instead of the three targets")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each target and dtype")
    given = parser.parse_args()
    sizes = dict(SIZES)
    if given.size:
        sizes = {f"random {size}": tuple(int(part) for part in size.split(",")) for size in given.size}
    results: dict[str, Any] = {
        "environment": environment(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "rows": [],
    }
    for (name, (vocab_size, hidden)), dtype in ((s, d) for s in sizes.items() for d in given.dtype):
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        # The weights, the groups' copy, and in float32 both again packed, each with as much free beside it.
        needed = vocab_size * hidden * kind.itemsize * (5 if kind == torch.float32 else 2)
        if needed > psutil.virtual_memory().available:
            print(f"{name}, {dtype} left out: it needs {needed / 1e9:.0f} GB of free memory", file=sys.stderr)
            continue
        shipped = name == "the shipped pair"
        target = (
            Target.load(EMBEDDED / "target", dtype=dtype)
            if shipped
            else random_target(vocab_size, hidden, kind)
        )
        results["rows"] += measure(name, target, given.seconds)
        del target
        print(f"{name}, {dtype}: done", file=sys.stderr)
        atomic_text(given.output / "results.json", json.dumps(results, indent=1) + "\n")
        atomic_text(given.output / "results.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
