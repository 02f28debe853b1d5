"""What padding costs a batch: EMS-SD's comparison (arXiv 2405.07542) with cycles of ours.

    python benchmarks/padding.py OUTPUT [--target MODEL --drafter DRAFTER --batch 1,2,4,8,16 --tree 2,6,7,0.1]

A batch that pads gives every text as many draft rows as the largest tree has (input), and every text's cache
as many rows as the text has that accepted most (KV), of which some are holes. Texts are written once, with
the same tree size in every batch; each of their verifications is timed in four ways, in turn, on caches that
stand beside the text's own. All else that a cycle does counts the same in each.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

from publish import header, show

import coral
from coral.cache import KVCache
from coral.cli.options import read_tree_size
from coral.decoding.cycle import Proposer, cycle
from coral.decoding.plain import Plain
from coral.decoding.state import State
from coral.suites import prompts
from coral.tree import DraftTree, TreeSize

Way = tuple[bool, bool]
WAYS: list[Way] = [*product((True, False), repeat=2)]  # input, KV: whether they are padded
NAMES = {
    (True, True): "padded", (True, False): "KV not padded", (False, True): "input not padded",
    (False, False): "neither padded",
}  # fmt: skip


class Timed:
    """A target that also verifies in all ways, whose seconds it counts. lengths: of the padded caches."""

    def __init__(self, target: Any, states: Sequence[State]) -> None:
        self.target, self.seconds, self.turn = target, Counter[Way](), 0
        self.lengths = {id(state.cache): state.cache.length for state in states}
        self.beside = {id(state.cache): state.cache.copy(state.cache.length, 4096) for state in states}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def verify(self, caches: Sequence[KVCache], trees: Sequence[DraftTree], layers: tuple[int, ...]) -> Any:
        self.turn += 1
        for i in range(len(WAYS)):
            way = WAYS[(self.turn + i) % len(WAYS)]
            beside = [self.beside[id(cache)] for cache in caches]
            for cache, real in zip(beside, caches, strict=True):
                cache.set_length(self.lengths[id(real)] if way[1] else real.length)
            most = max(map(len, trees)) if way[0] else 0
            shown = [padded(tree, most) for tree in trees]
            begin = perf_counter()
            self.target.verify(beside, shown, layers)
            self.seconds[way] += perf_counter() - begin
        return self.target.verify(caches, trees, layers)

    def accepted(self, states: Sequence[State], most: int) -> None:
        """All padded caches have as many rows more as the text that accepted most."""
        for state in states:
            self.lengths[id(state.cache)] += most


def padded(tree: DraftTree, size: int) -> DraftTree:
    tokens, parents, scores = tree.lists
    missing = size - len(tree)
    if missing <= 0:
        return tree
    return DraftTree(tokens + [0] * missing, parents + [0] * missing, scores + [-1e9] * missing)


def write(target: Any, proposer: Proposer, states: Sequence[State], size: TreeSize) -> dict[str, Any]:
    """Seconds by way of writing texts together, and tokens a cycle of one text."""
    for state in states:
        state.prefill(target, proposer.layers)
    timed = Timed(target, states)
    live, other, tokens, cycles = [*states], 0.0, 0, 0
    while live:
        done = cycle(timed, proposer, live, size)
        other += done[0].seconds - done[0].verify_seconds
        tokens, cycles = tokens + sum(len(each.tokens) for each in done), cycles + len(done)
        timed.accepted(live, max(len(each.tokens) for each in done))
        live = [state for state in live if not state.done]
    return {"tau": tokens / cycles, "seconds": {way: other + timed.seconds[way] for way in WAYS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--target")
    parser.add_argument("--drafter")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", default="1,2,4,8,16")
    parser.add_argument("--tree", default="2,6,7,0.1")
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    llm = coral.load(given.target, given.drafter, dtype=given.dtype, fallback=False)
    tree, batches = read_tree_size(given.tree), [int(size) for size in given.batch.split(",")]
    assert tree is not None
    suites = prompts.load(prompts.SUITES, limit=-(-max(batches) // 3))
    texts = [prompt.turns[0] for suite in zip(*suites.values(), strict=True) for prompt in suite]

    def states(count: int) -> list[State]:
        options = {"max_new_tokens": given.tokens, "ignore_eos": True}
        return [llm.start(text, **options) for text in texts[:count]]

    results = {**header(), "target": llm.target.name, "tree": str(tree), "rows": []}
    lines = [
        f"# Padded and not: {llm.target.name}, {llm.target.precision}, tree {tree}\n",
        "Times as fast as batched plain decoding of the same texts, without prompts.\n",
        f"| texts at once | {' | '.join(NAMES[way] for way in WAYS)} | tau |", "|---" * 6 + "|",
    ]  # fmt: skip
    for size in batches:
        plain = write(llm.target, Plain(), states(size), tree)["seconds"][False, False]
        drafted = write(llm.target, llm.proposer, states(size), tree)
        speedups = {NAMES[way]: plain / drafted["seconds"][way] for way in WAYS}
        results["rows"].append({"at_once": size, "tau": drafted["tau"], "speedups": speedups})
        cells = [f"{speedup:.2f}x" for speedup in speedups.values()]
        lines.append(f"| {size} | {' | '.join(cells)} | {drafted['tau']:.2f} |")
        print(lines[-1], flush=True)
    show(given.output, results, lines)


if __name__ == "__main__":
    main()
