"""A training run: what an update is, and what a checkpoint is.

Everything an update does is a function of (seed, number of the update, weights), so a run that is stopped and
started again equals one that was never stopped.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from coral.data.features import FeatureBatch, FeatureSource, Rows, feature_batch
from coral.drafters import checkpoint
from coral.errors import CoralError
from coral.target.record import TargetLike, TargetRecord
from coral.training import parallel, run_state
from coral.training.optimiser import Optimiser
from coral.training.recipe import TrainConfig
from coral.training.run_state import RunState, random_generator
from coral.training.schedule import learning_rate, order, progress


class TrainTarget(TargetLike, FeatureSource, Protocol):
    """What training asks of a target."""

    @property
    def model(self) -> Any: ...
    @property
    def config(self) -> Any: ...
    @property
    def head_bias(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Update:
    """What an update did."""

    rows: list[int]
    """Rows of the data that it read, in all processes."""
    learning_rate: float
    loss: float
    """Summed over the trained rows."""
    sums: dict[str, Tensor]
    """Those of `Outcome`."""
    gradient_norm: float

    @property
    def finite(self) -> bool:
        """Whether the weights have learnt from it."""
        return math.isfinite(self.gradient_norm) and math.isfinite(self.loss)


@dataclass
class Run:
    """A drafter in training, and all that decides its next update."""

    target: TrainTarget
    record: TargetRecord
    dataset: Rows
    inner: tuple[int, ...]
    """The layers whose states batches hold; see `Kind.inner`."""
    digest: str
    """Of the data; see `coral.data.rows_digest`."""
    output: Path
    config: TrainConfig
    accelerator: Accelerator
    drafter: Any
    learner: Any
    """The module that all processes train together; it holds the drafter."""
    count: Callable[[FeatureBatch], Tensor]
    """How many rows of a batch it trains."""
    parameters: list[nn.Parameter]
    optimiser: Optimiser
    state: RunState
    resumed: bool
    """Whether it goes on with the run in `output`."""

    @property
    def rows_per_update(self) -> int:
        return self.config.batch_size * self.config.accumulate * self.accelerator.num_processes

    @property
    def progress(self) -> float:
        """The part of the run that is done."""
        return progress(self.config, self.state, len(self.dataset), self.rows_per_update)

    def update(self, fraction: float) -> Update:
        """One update, when `fraction` of the run is done: the gradient of the mean loss over the next rows,
        clipped, and a step of the optimiser. Where it is not finite there is no step.
        """
        config, count = self.config, self.rows_per_update
        peak = config.optimiser.learning_rate or 1 / self.target.hidden_size
        rate = peak * learning_rate(config.optimiser, fraction)
        rows = order(config.seed, len(self.dataset), self.state.update * count, count)
        loss, sums = self._accumulate(rows, fraction)
        norm = parallel.clip(self.parameters, config.optimiser.gradient_clip)
        made = Update(rows, rate, loss, sums, norm)
        self.state.update += 1
        if made.finite:
            self.optimiser.step(rate)
        else:
            self.state.skipped += 1
        self.optimiser.zero_grad()
        return made

    def _accumulate(self, rows: list[int], fraction: float) -> tuple[float, dict[str, Tensor]]:
        """Leave the gradient of the mean loss over `rows` in the learner, when `fraction` of the run is done.

        Batch n of an update is the same, with the same random draws, whichever process reads it. So N
        processes that accumulate A batches learn what one does that accumulates N x A.

        Returns:
            The summed loss and the sums of `Outcome`, over all processes.
        """
        accelerator, config, target = self.accelerator, self.config, self.target
        rank, world, size = accelerator.process_index, accelerator.num_processes, config.batch_size
        numbers = range(rank, config.accumulate * world, world)  # of the update's batches: this process's
        parts, joined = [rows[n * size : (n + 1) * size] for n in numbers], target.device.type == "cpu"
        batches = [feature_batch(target, self.dataset, part, self.inner, joined=joined) for part in parts]
        trained = torch.stack([self.count(batch) for batch in batches]).sum()
        count = accelerator.reduce(trained.float()).clamp(min=1)
        loss = torch.zeros((), device=target.device)
        sums: dict[str, Tensor] = {}
        for number, batch in zip(numbers, batches, strict=True):
            last = number == numbers[-1]
            with nullcontext() if last else parallel.without_exchange(accelerator, self.learner):
                generator = random_generator(config.seed, 2, self.state.update, 0, number)
                outcome = self.learner(batch, target.head_weight, target.head_bias, generator, fraction)
                # The mean is over the rows of all processes, but gradients are averaged over processes.
                accelerator.backward(outcome.loss * world / count)
            loss = loss + outcome.loss.detach()
            sums = {name: part + sums.get(name, 0) for name, part in outcome.sums.items()}
        reduced = {name: accelerator.reduce(part).cpu() for name, part in sums.items()}
        return accelerator.reduce(loss).item(), reduced

    def save(self) -> None:
        """Write a checkpoint: the drafter whole, and beside it the optimiser's moments and where the run
        stands, which is all that the next update depends on. All processes must call this.
        """
        drafter, moments = self.whole_drafter(), self.optimiser.moments()
        if self.accelerator.is_main_process:
            run_state.save(
                self.output,
                drafter,
                self.record,
                self.config,
                moments,
                self.state,
                len(self.dataset),
                self.digest,
            )
        self.accelerator.wait_for_everyone()

    def whole_drafter(self) -> Any:
        """The drafter whole, in every process; all must call this.

        Raises:
            CoralError: a weight is not finite.
        """
        gathered = parallel.whole_drafter(self.drafter)
        if odd := checkpoint.not_finite(gathered.state_dict()):
            raise CoralError(
                f"after update {self.state.update} the weights {odd} are not finite; {self.output} keeps the "
                "last good checkpoint: lower the learning rate, or check the recipe's numbers."
            )
        return gathered
