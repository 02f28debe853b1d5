"""What a level of the draft tree costs with each LM head: `python benchmarks/heads.py OUTPUT`.

Times `topk` of the full head, of routed heads (router included), without and with a core, and of static,
low-rank and in-context heads, on the shipped pair's LM head and on random weights of the sizes of two LLMs.
Cost does not depend on what the weights are; recall does, and `coral bench` measures that. The heads take
turns call by call, so that a slow moment of the machine hits all of them, and each finds the caches as the
other left them. With one node, the root, a cycle begins: there the in-context head also reads what arrived.
Writes OUTPUT/results.json and OUTPUT/results.md. Under five minutes on a quiet machine.
"""

import argparse
import sys
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from publish import header, reproduce, save
from torch import nn

from coral.cache import KVCache
from coral.decoding.state import State
from coral.drafters.heads.full import FullHead
from coral.drafters.heads.groups import contiguous
from coral.drafters.heads.in_context import InContextHead
from coral.drafters.heads.low_rank import LowRankHead
from coral.drafters.heads.routed import RoutedHead, Router
from coral.drafters.heads.static import StaticHead
from coral.drafters.heads.store import Head
from coral.target.default import TOY
from coral.target.target import Target

SIZES = {
    "the shipped pair": (32000, 256),
    "Llama-3-8B": (128256, 4096),
    "Qwen2.5-7B": (152064, 3584),
}
GROUPS = (8, 16, 32, 64)
FRACTIONS = (1 / 8, 1 / 4, 1 / 2)
CORE = 2048  # beside 2 of 16 groups
VERIFIED = 16  # nodes of a tree
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
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "dtype": dtype}
    return SimpleNamespace(
        head_weight=weight, head_bias=None, head=head, tokenizer=None, eos_ids=frozenset([0]), **sizes
    )


@torch.inference_mode()
def time_heads(heads: dict[str, Head], target: Any, rows: int, k: int, seconds: float) -> dict[str, float]:
    """Median seconds of `topk` by head; the heads take turns for about so long."""
    times: dict[str, list[float]] = {name: [] for name in heads}
    (vocab_size, hidden), dtype = target.head_weight.shape, target.dtype
    text = torch.randint(vocab_size, (500,)).tolist()
    state = State(text, len(text), KVCache(0, 0), logits=torch.randn(VERIFIED, vocab_size))

    def turn() -> None:
        features, scores = torch.randn(rows, hidden).to(dtype), torch.randn(rows).clamp(max=0)
        if rows == 1:
            state.tokens += torch.randint(vocab_size, (3,)).tolist()
        for name, head in heads.items():
            begin = perf_counter()
            head.topk(features, k, [state], scores)
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


def routed(target: Any, groups: int, core: int, *active: int) -> dict[str, Head]:
    """Routed heads that share their weights; the lowest ids are their core."""
    vocab_size, hidden = target.head_weight.shape
    ids = contiguous(vocab_size - core, groups) + core
    ids = ids.masked_fill(ids < core, -1)  # what fills up
    heads: dict[str, Head] = {}
    whole = RoutedHead(target, Router(hidden, groups + (core > 0)), ids, groups)
    per_group = whole.ids.shape[1] * hidden * target.head_weight.element_size()
    for count in active:
        head = copy(whole)
        head.active, head.num_bytes = count, whole.num_bytes - (groups - count) * per_group
        heads[f"{count} of {groups} groups" + (f" beside {core:,} ids" if core else "")] = head
    return heads


def others(target: Any) -> dict[str, Head]:
    """One head of each other kind, of the sizes that are their defaults."""
    vocab_size, hidden = target.head_weight.shape
    kept, rank = vocab_size // 4, max(2, hidden // 8)
    down = torch.randn(rank, hidden)
    in_context = InContextHead(target)
    return {
        f"static, {kept:,} ids": StaticHead(target, torch.arange(kept)),
        f"low rank {rank}, 32 rescored": LowRankHead(target, torch.randn(vocab_size, rank), down, 32),
        f"in context, {in_context.size:,} ids": in_context,
    }


def measure(name: str, target: Any, seconds: float) -> list[dict[str, Any]]:
    """Rows of results for one target."""
    found: list[dict[str, Any]] = []
    core = min(CORE, len(target.head_weight) // 4)
    make: list[Callable[[], dict[str, Head]]] = [
        *(partial(routed, target, g, 0, *(round(part * g) for part in FRACTIONS)) for g in GROUPS),
        partial(routed, target, 16, core, 2),
        partial(others, target),
    ]
    for some in make:  # one after another, since each holds a copy of its rows
        heads: dict[str, Head] = {"full": FullHead(target), **some()}
        for rows, k in CALLS:
            times = time_heads(heads, target, rows, k, seconds / len(make) / len(CALLS))
            found += [
                {
                    "target": name,
                    "vocab_size": target.vocab_size,
                    "hidden_size": target.hidden_size,
                    "dtype": str(target.dtype).removeprefix("torch."),
                    "nodes": rows,
                    "k": k,
                    "head": label,
                    "seconds": taken,
                    "speedup": times["full"] / taken,
                    "bytes": heads[label].num_bytes,
                }
                for label, taken in times.items()
            ]
        del heads
    return found


def markdown(results: dict[str, Any]) -> str:
    """A table for each target and dtype: one line for each head."""
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
        for head in dict.fromkeys(row["head"] for row in mine):
            found = [[row for row in mine if _is(row, head, call)] for call in calls]
            cells = [f"{1000 * median(r['seconds'] for r in rows):.2f}" for rows in found]
            if head != "full":  # which was timed beside each of the others
                cells = [
                    f"{cell} ({rows[0]['speedup']:.1f}x)" for cell, rows in zip(cells, found, strict=True)
                ]
            lines.append(_line([head, f"{found[0][0]['bytes'] / 1e6:.1f}", *cells]))
        lines.append("")
    return "\n".join([*lines, reproduce(results), ""])


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
        **header(),
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
            Target.load(TOY / "target", dtype=dtype) if shipped else random_target(vocab_size, hidden, kind)
        )
        results["rows"] += measure(name, target, given.seconds)
        del target
        print(f"{name}, {dtype}: done", file=sys.stderr)
        save(given.output, results, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
