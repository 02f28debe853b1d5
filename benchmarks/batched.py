"""How many tokens a second the engine writes with 1, 2, 4 ... texts at once: with a drafter and without.

    python benchmarks/batched.py [--target MODEL --drafter DRAFTER --batch 1,2,4,8,16 --rounds 3]

Prompts are the first of the three suites, greedy, past end tokens, so that every text has the same length.
Each batch is written plain and with the drafter in turn, `--rounds` times; ratios are medians of rounds.
Texts that differ from those written alone end the run with an error.
"""

from __future__ import annotations

import argparse
import statistics
import time

import coral
from coral.decoding.plain import Plain
from coral.serving.engine import Engine
from coral.suites import prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--drafter")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", default="1,2,4,8,16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32, help="the engine's rows_budget")
    given = parser.parse_args()
    llm = coral.load(given.target, given.drafter, dtype=given.dtype)
    batches = [int(size) for size in given.batch.split(",")]
    suites = prompts.load(prompts.SUITES, limit=-(-max(batches) // 3))
    texts = [prompt.turns[0] for suite in zip(*suites.values(), strict=True) for prompt in suite]
    alone: dict[int, list[int]] = {}

    def write(size: int, proposer: object) -> tuple[float, float]:
        """Tokens a second, without prompts, and tokens a cycle."""
        engine = Engine(
            llm.target, proposer, llm.tree_size, size, rows_budget=given.rows, kept=0, chunk=10**6
        )
        options = {"max_new_tokens": given.tokens, "ignore_eos": True}
        states = [llm.start(text, **options) for text in texts[:size]]
        for state in states:
            engine.submit(state)
        engine.step()  # reads the prompts
        begin, seconds, cycles, written = time.perf_counter(), 0.0, 0, 0
        while engine.running:
            events = engine.step()
            cycles, written = cycles + len(events), written + sum(len(c.tokens) for _, c in events)
        seconds = time.perf_counter() - begin
        for i, state in enumerate(states):
            if alone.setdefault(i, state.written) != state.written:
                raise SystemExit(f"text {i} differs in a batch of {size}")
        return written / seconds, written / cycles

    print(f"{llm.target.name}, {llm.target.precision}, {llm.target.backend}, tree {llm.tree_size}")
    print("| texts at once | plain, tokens/s | drafter, tokens/s | ratio | least | most | tau |")
    print("|---|---|---|---|---|---|---|")
    write(1, llm.proposer)
    for size in batches:
        rounds = [(write(size, Plain()), write(size, llm.proposer)) for _ in range(given.rounds)]
        ratios = [drafted[0] / plain[0] for plain, drafted in rounds]
        plain, drafted = (statistics.median(each[i][0] for each in rounds) for i in range(2))
        tau = statistics.median(drafted[1] for _, drafted in rounds)
        print(
            f"| {size} | {plain:.1f} | {drafted:.1f} | {statistics.median(ratios):.2f}x | "
            f"{min(ratios):.2f}x | {max(ratios):.2f}x | {tau:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
