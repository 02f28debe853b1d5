"""How a run begins: anew, or where it stopped."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator

from coral.data.features import Rows, feature_batch, frequencies
from coral.data.rows_digest import digest_of
from coral.data.shards import refuse_other_target, with_inner
from coral.device import has_fast_bfloat16
from coral.drafters import checkpoint, kinds
from coral.errors import CoralError
from coral.target.record import TargetRecord
from coral.training import parallel, run_state, trackers
from coral.training.optimiser import Optimiser
from coral.training.recipe import TrainConfig, check
from coral.training.run import Run, TrainTarget
from coral.training.run_state import RunState, random_generator

_FEW_ROWS = 1024
"""An update of so many may read smaller data several times over."""


class Data(Protocol):
    """Prepared data, with or without stored features."""

    @property
    def dataset(self) -> Rows: ...


def begin(target: TrainTarget, data: Data, output: Path, config: TrainConfig, resume: bool) -> Run:
    """A run in `output` that is ready for its next update. Nothing is written yet.

    Raises:
        CoralError: as `coral.training.loop.train`.
    """
    check(config)
    config = replace(config, precision=_precision(config, target))
    checkpoint.refuse_foreign(output)
    dataset = data.dataset
    if len(dataset) == 0:
        raise CoralError("the prepared data holds no rows; prepare it from other conversations.")
    refuse_other_target(dataset, target)
    inner = kinds.find(config.kind).inner(target, config)
    dataset = with_inner(dataset, inner)
    accelerator = parallel.new_accelerator(
        target.device, log_with=trackers.make(config.reports.tracker, output) or None
    )
    _refuse_repeats(config, len(dataset), accelerator.num_processes)
    resumed = resume and (output / "coral" / "config.json").exists()
    _refuse_different(accelerator, resumed=resumed, rows=len(dataset))  # before the main process writes
    record, digest = TargetRecord.of(target), digest_of(data)
    drafter = _resumed_drafter(target, config, output) if resumed else new_drafter(target, config, dataset)
    drafter = drafter.to(device=target.device, dtype=torch.float32).train().requires_grad_(True)
    learner = kinds.find(config.kind).learner(drafter, config)
    if learner is None:
        raise CoralError(f"drafters of kind {config.kind!r} have nothing to train; use them as they are.")
    distributed = parallel.distribute(accelerator, learner)
    parameters = list(drafter.parameters())  # which distributing may have replaced
    run = Run(
        target=target,
        record=record,
        dataset=dataset,
        inner=inner,
        digest=digest,
        output=output,
        config=config,
        accelerator=accelerator,
        drafter=drafter,
        learner=distributed,
        count=learner.count,
        parameters=parameters,
        optimiser=Optimiser(drafter.named_parameters(), config.optimiser),
        state=RunState(processes=accelerator.num_processes),
        resumed=resumed,
    )
    if resumed:
        _resume(run)
    return run


def new_drafter(target: TrainTarget, config: TrainConfig, dataset: Rows) -> Any:
    """A drafter of the config's kind before its first update; see `kinds.Kind.new`."""
    kind, seed = kinds.find(config.kind), random_generator(config.seed, 0).initial_seed()
    batch = feature_batch(target, dataset, [0], kind.inner(target, config))
    counts = partial(frequencies, dataset, target.vocab_size)
    return kind.new(target, config, batch, seed, counts)


def _resumed_drafter(target: TrainTarget, config: TrainConfig, output: Path) -> Any:
    drafter = checkpoint.load(output, target)
    if drafter.kind != config.kind:
        raise CoralError(
            f"{output} holds a drafter of kind {drafter.kind!r}, and not {config.kind!r}; use kind="
            f"{drafter.kind}, or choose another output directory."
        )
    return drafter


def _resume(run: Run) -> None:
    """Give a run the state and the moments that lie in its output."""
    processes = run.accelerator.num_processes
    run.state, moments = run_state.load(run.output, run.config, len(run.dataset), run.digest, processes)
    try:
        run.optimiser.load(moments)
    except (ValueError, KeyError, TypeError) as error:
        raise CoralError(
            f"the training state in {run.output} is damaged ({error}); choose another output directory."
        ) from error


def _refuse_repeats(config: TrainConfig, rows: int, processes: int) -> None:
    """Raise CoralError for an update that would read little data very often: it has no end, or no memory."""
    asked = config.batch_size * config.accumulate * processes
    if asked > max(rows, _FEW_ROWS):
        raise CoralError(
            f"an update would read {asked:,} rows (batch_size x accumulate x processes), but the data holds "
            f"{rows:,}; lower batch_size or accumulate."
        )


def _precision(config: TrainConfig, target: TrainTarget) -> Literal["float32", "bfloat16"]:
    """What "auto" means beside this target on this device."""
    if config.precision != "auto":
        return config.precision
    half = target.head_weight.dtype in (torch.bfloat16, torch.float16)
    return "bfloat16" if half and has_fast_bfloat16(target.device) else "float32"


def _refuse_different(accelerator: Accelerator, *, resumed: bool, rows: int) -> None:
    """Raise CoralError unless all processes see the same run and as much data."""
    own = torch.tensor([[int(resumed), rows]], device=accelerator.device)
    seen = accelerator.gather(own)
    if (seen != own).any():
        raise CoralError(
            f"processes see different runs: [goes on, rows of data] are {seen.tolist()}; give every machine "
            "the same data, and an output directory that they share."
        )
