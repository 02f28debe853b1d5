"""The optimiser of a drafter: AdamW, or Muon for its matrices and AdamW for the rest."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from coral.device import has_fast_bfloat16
from coral.errors import CoralError
from coral.training import parallel
from coral.training.recipe import OptimiserConfig


class Float32Muon(torch.optim.Muon):
    """Muon with torch's numbers and state, and products in float32: torch's are in bfloat16, which takes many
    times as long on a processor that has no instructions for it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if (gradient := matrix.grad) is None:
                    continue
                buffer = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(gradient))
                buffer.lerp_(gradient, 1 - group["momentum"])
                step = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                size = 0.2 * max(matrix.shape) ** 0.5  # "match_rms_adamw"
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(_orthogonal(step, group), alpha=-group["lr"] * size)


def _orthogonal(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """Near U V^T of [m, n] = U S V^T, by the Newton-Schulz iteration of Jordan 2024, in float32."""
    a, b, c = group["ns_coefficients"]
    wide = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T
    wide = wide / wide.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Optimiser:
    """One or two of torch's optimisers for named parameters, stepped together at one learning rate.

    Muon (Jordan 2024) makes each step of a matrix orthogonal, so that rare directions are learnt as fast as
    common ones; its steps are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982). An LM head, whose
    rows are ids, learns with AdamW, as there.

    Raises:
        CoralError: Muon for matrices that are spread over processes.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], options: OptimiserConfig) -> None:
        named, muon_asked = dict(parameters), options.matrices == "muon"
        matrices = [p for name, p in named.items() if muon_asked and p.dim() == 2 and "lm_head" not in name]
        if any(isinstance(matrix, DTensor) for matrix in matrices):
            raise CoralError(
                "Muon needs whole matrices, but FSDP spreads them; leave --use_fsdp out, or say --set "
                "optimiser.matrices=adamw."
            )
        rest = [p for p in named.values() if not any(p is matrix for matrix in matrices)]
        decay = options.weight_decay
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=0.0, betas=(options.beta1, options.beta2), weight_decay=decay)
        ]
        if matrices:
            muon = torch.optim.Muon if has_fast_bfloat16(matrices[0].device) else Float32Muon
            self.parts.append(muon(matrices, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))

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
