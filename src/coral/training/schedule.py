"""What an update does, as a function of how far the run is: its learning rate, and its rows of the data."""

import math

import torch

from coral.training.recipe import OptimiserConfig, TrainConfig
from coral.training.run_state import RunState, random_generator


def learning_rate(options: OptimiserConfig, fraction: float) -> float:
    """The learning rate as a part of its peak, when `fraction` of the run is done."""
    if fraction < options.warmup:
        return max(fraction, 1e-6) / options.warmup
    done = (fraction - options.warmup) / max(1 - options.warmup, 1e-9)
    match options.decay:
        case "cosine":
            return options.final + (1 - options.final) * (1 + math.cos(math.pi * done)) / 2
        case "linear":
            return options.final + (1 - options.final) * (1 - done)
        case "constant":
            return 1.0


def progress(config: TrainConfig, state: RunState, examples: int, rows_per_update: int) -> float:
    """The part of the run that is done: that of the nearest limit."""
    limits, parts = config.limits, [0.0]
    if limits.updates is not None:
        parts.append(state.update / limits.updates)
    if limits.epochs is not None:
        parts.append(state.update / math.ceil(limits.epochs * examples / rows_per_update))
    if limits.minutes is not None:
        parts.append(state.seconds / (60 * limits.minutes))
    return min(1.0, max(parts))


def order(seed: int, examples: int, first: int, count: int) -> list[int]:
    """Rows first .. first+count of the endless sequence of one random permutation of the data after the
    other.
    """
    rows: list[int] = []
    while len(rows) < count:
        epoch, offset = divmod(first + len(rows), examples)
        permutation = torch.randperm(examples, generator=random_generator(seed, 1, epoch))
        rows += permutation[offset : offset + count - len(rows)].tolist()
    return rows
