"""Put a trained drafter into the package: weights in bfloat16, heads and tuned trees, not its training.

python benchmarks/ship.py DRAFTER
"""

import shutil
import sys
from pathlib import Path

import torch

from coral.drafters import checkpoint
from coral.target import default as models
from coral.target.record import TargetRecord


def main(source: str) -> None:
    target, directory = models.load(), Path(source)
    found = checkpoint.read_config(directory)
    drafter = checkpoint.load(directory, target).to(torch.bfloat16)
    record = TargetRecord.of(target)
    checkpoint.save(drafter, models.DRAFTER, target=record, recipe=found["recipe"], metrics=found["metrics"])
    for name in ("heads", "trees.json"):
        there, here = directory / "coral" / name, models.DRAFTER / "coral" / name
        if there.is_dir():
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(there, here, ignore=shutil.ignore_patterns("token_map.pt"))
        elif there.exists():
            shutil.copy(there, here)


if __name__ == "__main__":
    main(*sys.argv[1:])
