"""The training loop: batches in a fixed random order, updates, checkpoints, and an exact way back after a
stop.

Everything an update does is a function of (seed, number of the update, weights), so a run that is stopped and
started again equals one that was never stopped.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from coral.data.features import Rows, feature_batch
from coral.data.rows_digest import digest_of
from coral.data.shards import refuse_other_target
from coral.drafters import checkpoint
from coral.drafters.feature.drafted import trained_rows
from coral.drafters.feature.learn import Learner
from coral.drafters.feature.network import Drafter
from coral.errors import CoralError
from coral.locks import locks_output
from coral.machine import has_fast_bfloat16
from coral.native.memory import trim
from coral.target.record import TargetRecord
from coral.training import parallel, trackers
from coral.training import run_state as run_state
from coral.training.optimiser import Optimiser
from coral.training.progress import Reporter
from coral.training.recipe import TrainConfig, check
from coral.training.schedule import learning_rate, order, progress
from coral.training.start import TrainTarget, new_drafter

TRIM_EVERY = 10
"""Updates after which freed memory goes back to the kernel."""
PATIENCE = 10
"""Updates in a row without a finite gradient after which a run gives up."""


class Data(Protocol):
    """Prepared data, with or without stored features."""

    @property
    def dataset(self) -> Rows: ...


@dataclass(frozen=True)
class TrainOutcome:
    """How a run ended."""

    update: int
    """Updates made, those of earlier sittings included."""
    finished: bool
    """False when a signal stopped it before its limit."""
    skipped: int
    """Batches left out because their loss or gradient was not finite."""
    seconds: float
    acceptance: dict[str, Any]
    """The last measurement of the acceptance length, if any."""


@locks_output
def train(
    target: TrainTarget,
    data: Data,
    output: str | Path,
    config: TrainConfig,
    *,
    acceptance: Callable[[Drafter], dict[str, Any]] | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> TrainOutcome:
    """Train a drafter for `target` on `data` and keep it, with its state, in the directory `output`. A run
    that had finished there is left as it is.

    Args:
        acceptance: measures the drafter's real acceptance length; called in the main process, every
            `reports.acceptance_every` updates and at the end. Not where the target is sharded: there no
            process can decode alone.
        resume: go on with the run in `output`, if there is one; otherwise it is replaced.
        console: where progress is shown; standard error if not given.

    Raises:
        CoralError: a bad configuration, an output that is something else, another configuration or other
            data than the run in `output` had, another process that writes there, no data, features of another
            target, a tracker that is not installed, processes that see different runs, `PATIENCE` updates in
            a row that are not finite, or weights that are not.
    """
    check(config)
    config = replace(config, precision=_precision(config, target))
    output = Path(output)
    checkpoint.refuse_foreign(output)
    dataset = data.dataset
    if len(dataset) == 0:
        raise CoralError("the prepared data holds no rows; prepare it from other conversations.")
    refuse_other_target(dataset, target)
    accelerator = parallel.new_accelerator(
        target.device, log_with=trackers.make(config.reports.tracker, output) or None
    )
    resumed = resume and (output / "coral" / "config.json").exists()
    _refuse_different(accelerator, resumed=resumed, rows=len(dataset))  # before the main process writes
    if parallel.is_sharded(target):
        acceptance = None
    record, digest = TargetRecord.of(target), digest_of(data)
    if resumed:
        drafter = checkpoint.load(output, target)
    else:
        drafter = new_drafter(target, config, feature_batch(target, dataset, [0]))
    drafter = drafter.to(device=target.device, dtype=torch.float32).train().requires_grad_(True)
    learner = parallel.distribute(accelerator, Learner(drafter, config))
    options, parameters = config.optimiser, list(drafter.parameters())
    optimiser = Optimiser(parameters, options)
    state = run_state.RunState(processes=accelerator.num_processes)
    if resumed:
        state, moments = run_state.load(output, config, len(dataset), digest, accelerator.num_processes)
        try:
            optimiser.load(moments)
        except (ValueError, KeyError, TypeError) as error:
            raise CoralError(
                f"the training state in {output} is damaged ({error}); choose another output directory."
            ) from error
    rows_per_update = config.batch_size * config.accumulate * accelerator.num_processes
    peak = options.learning_rate or 1 / target.hidden_size
    if resumed and progress(config, state, len(dataset), rows_per_update) >= 1:
        with Reporter(output, not accelerator.is_main_process, console) as reporter:
            reporter.say(f"finished before, after update {state.update}: {output}; raise limits to go on")
        return TrainOutcome(state.update, True, state.skipped, state.seconds, state.acceptance)
    outdated = checkpoint.outdated(output, record)

    def gather() -> Drafter:
        """The drafter whole, in every process."""
        gathered = parallel.whole_drafter(drafter)
        if odd := checkpoint.not_finite(gathered.state_dict()):
            raise CoralError(
                f"after update {state.update} the weights {odd} are not finite; {output} keeps the last good "
                "checkpoint: lower the learning rate, or check the recipe's numbers."
            )
        return gathered

    def save() -> None:
        gathered, moments = gather(), optimiser.moments()
        if accelerator.is_main_process:
            run_state.save(output, gathered, record, config, moments, state, len(dataset), digest)
        accelerator.wait_for_everyone()

    def measure(reporter: Reporter) -> None:
        gathered = gather()
        if acceptance is not None and accelerator.is_main_process:
            paused = reporter.pause()
            gathered.eval()
            with torch.no_grad():
                state.acceptance = acceptance(gathered)
            gathered.train()
            reporter.go_on(paused)
            reporter.write({"update": state.update, "acceptance": state.acceptance})
            shown = "  ".join(
                f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in state.acceptance.items()
            )
            reporter.say(f"update {state.update}  acceptance length: {shown}")
        accelerator.wait_for_everyone()

    def track(line: dict[str, Any]) -> None:
        accelerator.log(trackers.flat(line), step=line["update"])

    if config.reports.tracker != "none":
        accelerator.init_trackers(trackers.PROJECT, trackers.flat({**asdict(config), "target": target.name}))
    if not resumed:
        save()  # so that a full or read-only disk is found now, not after hours
    started = time.monotonic() - state.seconds
    saved, broken, measured = state.seconds, 0, -1
    with (
        Reporter(output, not accelerator.is_main_process, console, track) as reporter,
        run_state.stop_signals() as stop,
    ):
        if resumed:
            reporter.forget_after(state.update)
            reporter.say(f"going on after update {state.update}")
        if outdated:
            reporter.say(outdated)
        reporter.say(f"{len(dataset):,} rows, {rows_per_update} in an update, products in {config.precision}")
        if accelerator.num_processes > 1:
            reporter.say(f"{accelerator.num_processes} processes, {rows_per_update} rows in an update")
        while True:
            # All processes follow the main one's clock, and all stop when one is told to.
            clock = time.monotonic() - started if accelerator.is_main_process else 0.0
            shared = torch.tensor([clock, float(len(stop))], device=accelerator.device)
            state.seconds, stopping = accelerator.reduce(shared).tolist()
            fraction = progress(config, state, len(dataset), rows_per_update)
            if fraction >= 1 or stopping:
                break
            rate = peak * learning_rate(options, fraction)
            rows = order(config.seed, len(dataset), state.update * rows_per_update, rows_per_update)
            steps = 1 if fraction < config.one_step else config.steps
            loss, sums = _accumulate(accelerator, learner, config, target, dataset, rows, state.update, steps)
            norm = parallel.clip(parameters, options.gradient_clip)
            state.update += 1
            if math.isfinite(norm) and math.isfinite(loss):
                broken = 0
                optimiser.step(rate)
                reporter.add(loss, sums)
            else:
                broken, state.skipped = broken + 1, state.skipped + 1
                reporter.say(
                    f"update {state.update} skipped: loss or gradient not finite on rows {sorted(rows)}"
                )
                if broken == PATIENCE:
                    raise CoralError(
                        f"{PATIENCE} updates in a row had no finite loss or gradient (last: rows "
                        f"{sorted(rows)}); {output} keeps the last good checkpoint: lower the learning rate "
                        "or check these rows."
                    )
            optimiser.zero_grad()
            if state.update % TRIM_EVERY == 0:
                trim()
            if state.update % config.reports.log_every == 0:
                reporter.log(
                    state.update,
                    fraction,
                    learning_rate=rate,
                    gradient_norm=norm,
                    skipped=state.skipped,
                    seconds=state.seconds,
                )
            every = config.reports.acceptance_every
            if every and state.update % every == 0:
                measure(reporter)
                measured = state.update
            # By the shared clock, since all processes must save together.
            if state.seconds - saved > 60 * config.reports.checkpoint_minutes and not broken:
                paused = reporter.pause()
                save()
                reporter.go_on(paused)
                saved = state.seconds
        if fraction >= 1 and 0 < state.update == state.skipped:
            raise CoralError(
                f"none of {state.update} updates had a finite loss and gradient, so nothing was learnt; "
                "check the data and the recipe's numbers."
            )
        if fraction >= 1 and measured != state.update:
            measure(reporter)
        save()
        if fraction < 1:
            reporter.say(f"stopped at update {state.update}; run the same command to go on")
        else:
            reporter.say(f"finished after update {state.update}: {output}")
            reporter.say(f"`coral tune {output}` finds the tree that is fastest here, and its speedup")
    accelerator.end_training()
    return TrainOutcome(state.update, fraction >= 1, state.skipped, state.seconds, state.acceptance)


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


def _accumulate(
    accelerator: Accelerator,
    learner: Any,
    config: TrainConfig,
    target: TrainTarget,
    dataset: Rows,
    rows: list[int],
    update: int,
    steps: int,
) -> tuple[float, dict[str, Tensor]]:
    """Leave the gradient of the mean loss over `rows` in so many draft steps in the learner; the summed loss,
    and the sums of `Outcome`.

    Batch n of an update is the same, with the same random draws, whichever process reads it. So N processes
    that accumulate A batches learn what one does that accumulates N x A.
    """
    rank, world, size = accelerator.process_index, accelerator.num_processes, config.batch_size
    numbers = range(rank, config.accumulate * world, world)  # of the update's batches: those of this process
    parts, joined = [rows[n * size : (n + 1) * size] for n in numbers], target.device.type == "cpu"
    batches = [feature_batch(target, dataset, part, joined=joined) for part in parts]
    trained = torch.stack([trained_rows(b.loss_mask, b.document_starts, 1).sum() for b in batches]).sum()
    count = accelerator.reduce(trained.float()).clamp(min=1)
    loss = torch.zeros((), device=target.device)
    sums: dict[str, Tensor] = {}
    for number, batch in zip(numbers, batches, strict=True):
        last = number == numbers[-1]
        with nullcontext() if last else parallel.without_exchange(accelerator, learner):
            generator = run_state.random_generator(config.seed, 2, update, 0, number)
            outcome = learner(batch, target.head_weight, target.head_bias, generator, steps)
            # The mean is over the rows of all processes, but gradients are averaged over processes.
            accelerator.backward(outcome.loss * world / count)
        loss = loss + outcome.loss.detach()
        sums = {name: part + sums.get(name, 0) for name, part in outcome.sums.items()}
    return accelerator.reduce(loss).item(), {
        name: accelerator.reduce(part).cpu() for name, part in sums.items()
    }
