"""Compare the drafters of a plan on the held-out prompts of their data; the suites never choose an option.

    python benchmarks/held_out.py PLAN DATA RUNS BASE [options of `coral bench`]

One-thread benches side by side: acceptance does not depend on the clock, and the speeds of these runs mean
nothing. Prints each drafter's tau and its difference from BASE with a 95% paired bootstrap interval over
prompts, as Markdown. Names that end in -0, -1, -2 are seeds of one recipe and are pooled, unless BASE is one
run.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from coral.bench import log
from coral.bench.compare import compare
from coral.bench.formulas import tau


def main(plan: str, data: str, runs: str, base: str, *options: str) -> None:
    """RUNS holds what train_all.py wrote; benches go to RUNS/bench-0 and so on."""
    names = [name for name in yaml.safe_load(Path(plan).read_text())["runs"] if Path(runs, name).is_dir()]
    parts = [names[i :: os.cpu_count()] for i in range(os.cpu_count() or 1)]

    def bench(number: int) -> int:
        command = [str(Path(sys.executable).with_name("coral")), "--threads", "1", "bench", "--suite", data]
        for name in parts[number]:
            command += ["--drafter", f"{name}={runs}/{name}"]
        command += ["--dtype", "float32", "--no-peers", "--backend=transformers", *options]
        with Path(f"{runs}/bench-{number}.log").open("a") as file:
            output = f"{runs}/bench-{number}"
            return subprocess.call([*command, "--output", output], stdout=file, stderr=file)

    with ThreadPoolExecutor() as pool:
        if any(pool.map(bench, filter(parts.__getitem__, range(len(parts))))):
            sys.exit(f"a bench failed; see {runs}/bench-*.log")
    records = [log.read(path) for path in sorted(Path(runs).glob("bench-*")) if path.is_dir()]
    seeds: dict[str, list[str]] = {}
    for name in names:
        seeds.setdefault(re.sub(r"-[0-2]$", "", name) if base not in names else name, []).append(name)
    print(f"| run | T | tau | difference from `{base}` |\n|---|---|---|---|")
    for name, members in seeds.items():
        for d in compare(members, seeds[base], records):
            if d.suite == "all":
                cycles = [
                    cycle
                    for _, run in records
                    for r in run
                    if r.method in members and (r.temperature, r.coupled) == (d.temperature, d.coupled)
                    for cycle in r.cycles
                ]
                noise = "" if d.temperature == 0 else ", coupled" if d.coupled else ", uncoupled"
                shown = f"{d.tau.value:+.3f} [{d.tau.low:+.3f}, {d.tau.high:+.3f}]" if name != base else ""
                print(f"| {name} | {d.temperature:g}{noise} | {tau(cycles):.3f} | {shown} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
