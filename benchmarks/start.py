"""Seconds until a first token, and where they go: a first start against a second one, each a process.

    python benchmarks/start.py [TARGET]

The first one is made by forgetting what an earlier start wrote down (`target/second_start.py`); native code
is built and a GGUF file converted before. The parts are those of one more process, which times itself.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from time import perf_counter

from coral.target import second_start

ROUNDS = 5
PARTS = """
from time import perf_counter
t = [perf_counter()]
import torch; t.append(perf_counter())
import coral.api, coral.cli.chat; t.append(perf_counter())
llm = coral.api.load({target!r}); t.append(perf_counter())
next(llm.stream("Hi")); t.append(perf_counter())
print(*(b - a for a, b in zip(t, t[1:])))
"""


def seconds(*command: str) -> float:
    begin = perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return perf_counter() - begin


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else None
    named = [] if target is None else ["--target", target]
    command = ["-m", "coral", "generate", "Hi", "--max-new-tokens", "1", *named]
    seconds(*command)
    rows: dict[str, list[float]] = {"first start": [], "second start": [], "import torch alone": []}
    for _ in range(ROUNDS):
        second_start.clear()
        for name in ("first start", "second start"):
            rows[name].append(seconds(*command))
        rows["import torch alone"].append(seconds("-c", "import torch"))
    print("| process | seconds, median | least |\n|---|---|---|")
    for name, each in rows.items():
        print(f"| {name} | {median(each):.2f} | {min(each):.2f} |")
    said = subprocess.run(
        [sys.executable, "-c", PARTS.format(target=target)], check=True, capture_output=True, text=True
    ).stdout
    parts = "import torch", "our imports", "load target and drafter", "first token"
    print("\n| part of a second start | seconds |\n|---|---|")
    for name, value in zip(parts, said.split(), strict=True):
        print(f"| {name} | {float(value):.2f} |")


if __name__ == "__main__":
    main()
