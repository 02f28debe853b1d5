"""How long a prompt takes to be read: `python benchmarks/prompts.py OUTPUT`.

The shipped target, deepened to 32 layers, reads prompts of several lengths by transformers' code and by its
native forward, in turn; medians. Beside them the drafter reads the same rows and drafts one chain. Writes
OUTPUT/results.json and OUTPUT/results.md. Two minutes, on a quiet machine.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from publish import header, show

from coral.bench.deepen import deepen
from coral.cli.options import quiet_transformers
from coral.decoding.state import State
from coral.drafters.drafting import Drafting
from coral.native.memory import keep_freed_memory
from coral.target.default import TOY
from coral.target.target import Target
from coral.tree import TreeSize

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    keep_freed_memory()
    quiet_transformers()
    rows = []
    for dtype in ("float32", "bfloat16"):
        target = Target.load(TOY / "target", dtype=dtype)
        deepen(target.model, options.layers)
        native = target.on("native")
        assert not native.pads, "this target is not run natively"
        proposer = Drafting(TOY / "drafter", "static", fallback=False).proposer(native)
        for length in LENGTHS:
            tokens = torch.randint(10, target.vocab_size, (length + 1,)).tolist()
            seconds: dict[str, list[float]] = {"torch": [], "native": [], "drafter": []}
            for _ in range(options.repeats):
                for name, reader in (("torch", target), ("native", native)):
                    state = State(tokens, length + 32, reader.new_cache(length + 32))
                    begin = perf_counter()
                    state.prefill(reader, proposer.layers)
                    seconds[name].append(perf_counter() - begin)
                begin = perf_counter()
                proposer.propose([state], TreeSize(1, 6, 6))
                seconds["drafter"].append(perf_counter() - begin)
            rows.append({"dtype": dtype, "tokens": length} | {k: median(v) for k, v in seconds.items()})
    lines = [
        "| tokens | dtype | torch, ms | native, ms | ratio | drafter and its first chain, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        torch_ms, native_ms, drafter_ms = (1000 * row[name] for name in ("torch", "native", "drafter"))
        lines.append(
            f"| {row['tokens']} | {row['dtype']} | {torch_ms:.1f} | {native_ms:.1f} | "
            f"{torch_ms / native_ms:.1f}x | {drafter_ms:.1f} |"
        )
    show(options.output, header() | {"rows": rows}, lines)


if __name__ == "__main__":
    main()
