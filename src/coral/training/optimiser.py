"""The optimiser of a drafter: AdamW, or Muon for its matrices and AdamW for the rest."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from coral.errors import CoralError
from coral.training import parallel
from coral.training.recipe import OptimiserConfig


class Optimiser:
    """One or two of torch's optimisers, stepped together at one learning rate.

    Muon (Jordan 2024) makes each step of a matrix orthogonal, so that rare directions are learnt as fast as
    common ones; its steps are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982).

    Raises:
        CoralError: Muon for matrices that are spread over processes.
    """

    def __init__(self, parameters: Sequence[Tensor], options: OptimiserConfig) -> None:
        matrices = [p for p in parameters if p.dim() == 2] if options.matrices == "muon" else []
        if any(isinstance(matrix, DTensor) for matrix in matrices):
            raise CoralError(
                "Muon needs whole matrices, but FSDP spreads them; leave --use_fsdp out, or say --set "
                "optimiser.matrices=adamw."
            )
        rest = [p for p in parameters if p.dim() != 2 or not matrices]
        decay = options.weight_decay
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=0.0, betas=(options.beta1, options.beta2), weight_decay=decay)
        ]
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, learning_rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def moments(self) -> list[dict[str, Any]]:
        """The state in the CPU's memory; see `parallel.whole_moments`."""
        return [parallel.whole_moments(part) for part in self.parts]

    def load(self, moments: list[dict[str, Any]]) -> None:
        """Go on from what `moments` returned."""
        for part, own in zip(self.parts, moments, strict=True):
            parallel.load_moments(part, own)
