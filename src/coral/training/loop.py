"""The training loop: updates until a limit or a signal, with reports, measurements and checkpoints."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from coral.drafters import checkpoint
from coral.errors import CoralError
from coral.locks import locks_output
from coral.native.memory import trim
from coral.training import parallel, run_state, trackers
from coral.training.recipe import TrainConfig
from coral.training.reporter import Reporter
from coral.training.run import Run, TrainTarget, Update
from coral.training.start import Data, begin

TRIM_EVERY = 10
"""Updates after which freed memory goes back to the kernel."""
PATIENCE = 10
"""Updates in a row without a finite gradient after which a run gives up."""

Acceptance = Callable[[Any], dict[str, Any]]
"""Measures a drafter's real acceptance length."""


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
    acceptance: Acceptance | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> TrainOutcome:
    """Train a drafter for `target` on `data` and keep it, with its state, in the directory `output`. A run
    that had finished there is left as it is.

    Args:
        acceptance: called in the main process, every `reports.acceptance_every` updates and at the end. Not
            where the target is sharded: there no process can decode alone.
        resume: go on with the run in `output`, if there is one; otherwise it is replaced.
        console: where progress is shown; standard error if not given.

    Raises:
        CoralError: a bad configuration, an output that is something else, another configuration or other
            data than the run in `output` had, another process that writes there, no data, features of another
            target, a tracker that is not installed, processes that see different runs, `PATIENCE` updates in
            a row that are not finite, or weights that are not.
    """
    run = begin(target, data, Path(output), config, resume)
    mute, reports = not run.accelerator.is_main_process, run.config.reports
    if run.resumed and run.progress >= 1:
        with Reporter(run.output, mute, console) as reporter:
            done = f"finished before, after update {run.state.update}"
            reporter.say(f"{done}: {run.output}; raise limits to go on")
        return _outcome(run, finished=True)
    outdated = checkpoint.outdated(run.output, run.record)
    if reports.tracker != "none":
        settings = {**asdict(run.config), "target": target.name}
        run.accelerator.init_trackers(trackers.PROJECT, trackers.flat(settings))
    if not run.resumed:
        run.save()  # so that a full or read-only disk is found now, not after hours

    def track(line: dict[str, Any]) -> None:
        run.accelerator.log(trackers.flat(line), step=line["update"])

    with Reporter(run.output, mute, console, track) as reporter, run_state.stop_signals() as stop:
        _say_what_is_done(run, reporter, outdated)
        finished = _loop(run, reporter, stop, None if parallel.is_sharded(target) else acceptance)
        run.save()
        if finished:
            reporter.say(f"finished after update {run.state.update}: {output}")
            reporter.say(f"`coral tune {output}` finds the tree that is fastest here, and its speedup")
        else:
            reporter.say(f"stopped at update {run.state.update}; run the same command to go on")
    run.accelerator.end_training()
    return _outcome(run, finished)


def _loop(run: Run, reporter: Reporter, stop: list[int], acceptance: Acceptance | None) -> bool:
    """Update until a limit is reached (True) or a signal fills `stop` (False)."""
    state, reports = run.state, run.config.reports
    started = time.monotonic() - state.seconds
    saved, broken, measured = state.seconds, 0, -1
    while True:
        stopping, fraction = _share_clock(run, started, stop), run.progress
        if fraction >= 1 or stopping:
            break
        made = run.update(fraction)
        broken = 0 if made.finite else broken + 1
        if made.finite:
            reporter.add(state.update, fraction, made.loss, made.sums)
        else:
            _say_skipped(run, reporter, made, broken)
        if state.update % TRIM_EVERY == 0:
            trim()
        if state.update % reports.log_every == 0:
            reporter.log(
                state.update,
                fraction,
                learning_rate=made.learning_rate,
                gradient_norm=made.gradient_norm,
                skipped=state.skipped,
                seconds=state.seconds,
            )
        if reports.acceptance_every and state.update % reports.acceptance_every == 0:
            _measure(run, reporter, acceptance)
            measured = state.update
        # By the shared clock, since all processes must save together.
        if state.seconds - saved > 60 * reports.checkpoint_minutes and not broken:
            with reporter.paused():
                run.save()
            saved = state.seconds
    if fraction < 1:
        return False
    if 0 < state.update == state.skipped:
        raise CoralError(
            f"none of {state.update} updates had a finite loss and gradient, so nothing was learnt; "
            "check the data and the recipe's numbers."
        )
    if measured != state.update:
        run.save()  # to measure takes a minute, in which nothing may be lost
        _measure(run, reporter, acceptance)
    return True


def _share_clock(run: Run, started: float, stop: list[int]) -> bool:
    """Bring all processes to the main one's clock; whether any of them was told to stop."""
    accelerator = run.accelerator
    clock = time.monotonic() - started if accelerator.is_main_process else 0.0
    shared = torch.tensor([clock, float(len(stop))], device=accelerator.device)
    run.state.seconds, stopping = accelerator.reduce(shared).tolist()
    return stopping > 0


def _measure(run: Run, reporter: Reporter, acceptance: Acceptance | None) -> None:
    """Measure the acceptance length in the main process, for which the others wait."""
    drafter, state = run.whole_drafter(), run.state
    if acceptance is not None and run.accelerator.is_main_process:
        with reporter.paused(), torch.no_grad():
            reporter.show("measuring the acceptance length", run.progress)
            drafter.eval()
            state.acceptance = acceptance(drafter)
            drafter.train()
        reporter.write({"update": state.update, "acceptance": state.acceptance})
        shown = "  ".join(
            f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in state.acceptance.items()
        )
        reporter.say(f"update {state.update}  acceptance length: {shown}")
    run.accelerator.wait_for_everyone()


def _say_what_is_done(run: Run, reporter: Reporter, outdated: str | None) -> None:
    if run.resumed:
        reporter.forget_after(run.state.update)
        reporter.say(f"going on after update {run.state.update}")
    if outdated:
        reporter.say(outdated)
    rows, count, processes = len(run.dataset), run.rows_per_update, run.accelerator.num_processes
    reporter.say(f"{rows:,} rows, {count} in an update, products in {run.config.precision}")
    if processes > 1:
        reporter.say(f"{processes} processes, {count} rows in an update")


def _say_skipped(run: Run, reporter: Reporter, made: Update, broken: int) -> None:
    """Name the rows of an update that was not finite, the last of `broken` in a row.

    Raises:
        CoralError: these are `PATIENCE`.
    """
    rows = sorted(made.rows)
    reporter.say(f"update {run.state.update} skipped: loss or gradient not finite on rows {rows}")
    if broken == PATIENCE:
        raise CoralError(
            f"{PATIENCE} updates in a row had no finite loss or gradient (last: rows {rows}); {run.output} "
            "keeps the last good checkpoint: lower the learning rate or check these rows."
        )


def _outcome(run: Run, finished: bool) -> TrainOutcome:
    state = run.state
    return TrainOutcome(state.update, finished, state.skipped, state.seconds, state.acceptance)
