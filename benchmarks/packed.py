"""What a GGUF file's own blocks gain over bfloat16: `python benchmarks/packed.py FILE.gguf ...`.

Forwards of a chain of n nodes behind 200 tokens, packed and in bfloat16, in turn in one process, so that a
slow moment of the machine hits both. The fastest quarter of each is averaged, and the median of the ratios of
neighbours stands beside. On a busy machine --processor-time counts the time in which one thread runs
(OMP_NUM_THREADS=1); memory is shared with the others all the same.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from time import perf_counter, process_time

import torch

from coral.decoding.state import State
from coral.target.target import Target
from coral.tree import DraftTree

ROWS = (1, 4, 8, 16, 32, 64)


def timed(target: Target, state: State, rows: int, clock: Callable[[], float]) -> float:
    length, token = state.cache.length, state.tokens[-1]
    chain = DraftTree(torch.full((rows,), token), torch.arange(-1, rows - 1), torch.zeros(rows))
    begin = clock()
    target.verify([state.cache], [chain])
    seconds = clock() - begin
    state.cache.keep(length)
    return seconds


def compare(file: Path, rounds: int, clock: Callable[[], float]) -> list[str]:
    """Lines of a table, one a number of rows."""
    wide, packed = Target.load(file).on("native"), Target.load(file, dtype="packed")
    prefix = [(7 * i + 11) % 5000 + 100 for i in range(201)]
    pairs = []
    for target in (wide, packed):
        state = State(list(prefix), len(prefix) + 1, target.new_cache(len(prefix) + max(ROWS) + 1))
        state.prefill(target, (-1,))
        pairs.append((target, state))
    lines = []
    for rows in ROWS:
        times = [[timed(target, state, rows, clock) for target, state in pairs] for _ in range(rounds + 1)][
            1:
        ]
        own = [1000 * mean(sorted(column)[: max(1, rounds // 4)]) for column in zip(*times, strict=True)]
        ratio = median(a / b for a, b in times)
        lines.append(
            f"| {file.stem} | {rows} | {own[0]:.1f} | {own[1]:.1f} | {own[0] / own[1]:.2f} | {ratio:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    clock = process_time if options.processor_time else perf_counter
    print(
        "| file | rows | bfloat16, ms | packed, ms | ratio | ratio of neighbours |\n|---|---|---|---|---|---|"
    )
    for file in options.files:
        print("\n".join(compare(file, options.rounds, clock)), flush=True)


if __name__ == "__main__":
    main()
