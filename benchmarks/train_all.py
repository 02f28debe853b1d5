"""Train the drafters of a comparison: `python benchmarks/train_all.py benchmarks/recipes.yaml DATA OUTPUT`.

Several one-thread runs at a time, which on a CPU is faster than one run with several threads. A run that is
finished is left alone and a stopped one goes on, so the same command ends what it began.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml


def main(plan: str, data: str, output: str) -> None:
    """The plan: `common`, options of every run; `runs`, name -> the options it has beside them."""
    content = yaml.safe_load(Path(plan).read_text())
    Path(output).mkdir(parents=True, exist_ok=True)

    def train(run: tuple[str, str]) -> int:
        name, options = run
        command = [str(Path(sys.executable).with_name("coral")), "--threads", "1", "train", "--data", data]
        command += ["--output", f"{output}/{name}", *content["common"].split(), *options.split()]
        with Path(f"{output}/{name}.log").open("a") as log:
            code = subprocess.call(command, stdout=log, stderr=log)
        print(
            f"{name}: {'trained' if code == 0 else f'stopped with code {code}, see {log.name}'}", flush=True
        )
        return code

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        sys.exit(max(pool.map(train, content["runs"].items())))


if __name__ == "__main__":
    main(*sys.argv[1:])
