"""How much a drafter that always misses slows a text down: `python benchmarks/hostile.py OUTPUT`.

The shipped pair, as shipped, where a draft step is dear beside a plain one, with a head that proposes the
neighbour of every id it means: as sure of itself as the real one, and always wrong. 24 prompts (8 of each
suite), 128 tokens each, against plain decoding, in turn; sums of seconds, median of five runs. Writes
OUTPUT/results.json and OUTPUT/results.md. Under ten minutes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from publish import header, show
from torch import Tensor

from coral.bench.methods import ours
from coral.cli.options import quiet_transformers
from coral.decoding.cycle import acceptance_length
from coral.decoding.fallback import Fallback
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.drafters.drafting import Drafting
from coral.drafters.heads.rows import Table
from coral.drafters.heads.static import StaticHead
from coral.native.memory import keep_freed_memory
from coral.suites import prompts as suites
from coral.target.default import TOY
from coral.target.target import Target
from coral.tree import CPU_DEFAULT


class Missing:
    """The ids beside those that a head finds."""

    def __init__(self, head: StaticHead, vocab_size: int) -> None:
        self.head, self.num_bytes, self.vocab_size = head, head.num_bytes, vocab_size

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        ids, log_probs = self.head.topk(features, k, states, scores)
        return self.others(ids), log_probs

    def table(self, state: Any) -> Table:
        table = self.head.table(state)
        return table._replace(ids=self.others(table.ids))

    def others(self, ids: Tensor) -> Tensor:
        return (ids + self.vocab_size // 2) % self.vocab_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8, help="of each suite")
    options = parser.parse_args()
    keep_freed_memory()
    quiet_transformers()
    target = Target.load(TOY / "target", dtype="float32").on("native")
    feature: Any = Drafting(TOY / "drafter", fallback=False).proposer(target)
    feature.head = Missing(feature.head, target.vocab_size)
    loaded = suites.load("mt_bench,humaneval,gsm8k", options.prompts)
    prompts = [suites.render(target.tokenizer, prompt) for suite in loaded.values() for prompt in suite]
    prompts = [ids for ids in prompts if len(ids) + options.tokens <= target.context_length]
    sides = {"plain": Plain, "hostile": lambda: Fallback(feature), "hostile, no fallback": lambda: feature}
    for make in sides.values():
        ours(target, make(), CPU_DEFAULT)(prompts[0], Sampling(), 0, 32)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    texts, taus = {}, {}
    for _ in range(options.runs):
        written: dict[str, list[Any]] = {name: [] for name in sides}
        writers = {name: ours(target, make(), CPU_DEFAULT) for name, make in sides.items()}
        for number, ids in enumerate(prompts):
            for name, write in writers.items():
                written[name].append(write(ids, Sampling(), number, options.tokens))
        for name, found in written.items():
            seconds[name].append(sum(text.seconds for text in found))
            texts[name] = [text.tokens for text in found]
            taus[name] = acceptance_length([cycle for text in found for cycle in text.cycles])
    ratios = {
        name: median(s / p for s, p in zip(seconds[name], seconds["plain"], strict=True)) for name in sides
    }
    results = {
        **header(),
        "seconds": seconds,
        "time_over_plain": ratios,
        "tau": taus,
        "identical": {name: found == texts["plain"] for name, found in texts.items()},
    }
    lines = [
        f"{len(prompts)} prompts, {options.tokens} tokens each, {options.runs} runs.",
        "",
        "| | seconds, median | time / plain, median of runs | tau | identical |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {median(seconds[name]):.1f} | {ratios[name]:.3f} | {taus[name]:.2f} | "
            f"{'yes' if texts[name] == texts['plain'] else 'NO'} |"
            for name in sides
        ),
    ]
    show(options.output, results, lines)


if __name__ == "__main__":
    main()
