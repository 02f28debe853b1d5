"""What a recipe may say of the unroll, whatever kind of drafter is unrolled."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from coral.drafters.recurrent.alignment import AlignmentConfig
from coral.drafters.recurrent.losses import LossConfig
from coral.errors import CoralError


@dataclass(frozen=True)
class UnrollOptions:
    """Raises CoralError for losses that would teach nothing."""

    steps: Annotated[int, Field(ge=1, le=64)] = 3
    """Draft steps of the unroll."""
    detach: bool = True
    """Stop gradients between draft steps."""
    one_step: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Part of the run, from its start, with one draft step only. Later steps build on the first, which learns
    three times as fast alone."""
    checkpoint_steps: bool = False
    """Compute each draft step's activations again in the backward pass instead of keeping them: less memory
    for one more forward pass of the drafter."""
    head_chunk: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Trained rows that meet the LM head at a time, each with V float32 scores; none: as many as fill 64 MB,
    and no fewer than 256, below which the products get slow."""
    loss: LossConfig = field(default_factory=LossConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)

    def __post_init__(self) -> None:
        weights = [self.loss.regression, self.loss.divergence_weight, self.loss.top_k_weight]
        if not any(weights) and not (self.alignment.weight and self.alignment.kind != "none"):
            raise CoralError(
                "every weight of the loss is 0, so nothing would be learnt; set loss.regression, say."
            )
