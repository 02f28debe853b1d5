"""What a recipe may say of such a drafter and of how it learns."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from coral.drafters.recurrent.alignment import AlignmentConfig
from coral.drafters.recurrent.losses import LossConfig
from coral.errors import CoralError


@dataclass(frozen=True)
class DrafterOptions:
    """What the drafter is made of; sizes that are not given are the target's."""

    num_layers: Annotated[int, Field(ge=1, le=1000)] = 1
    """Decoder layers. Engines load one-layer drafters only."""
    intermediate_size: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Width of the feed-forward block."""
    normalised_feedback: bool = False
    """Bring draft features to unit RMS before they are fed back. Engines do not know this option."""
    init_layer: int | None = None
    """Start from this decoder layer of the target (-1 is the last) instead of from random weights."""
    init_drafter: str | None = None
    """Start from the weights of this drafter directory or hub id. It may have fewer layers or a narrower
    feed-forward block; what is added starts without effect."""


@dataclass(frozen=True)
class Options:
    """All of it. Raises CoralError for losses that would teach nothing."""

    steps: Annotated[int, Field(ge=1, le=64)] = 3
    """Draft steps of the unroll."""
    detach: bool = True
    """Stop gradients between draft steps."""
    one_step: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Part of the run, from its start, with one draft step only. Later steps build on the first, which learns
    three times as fast alone."""
    noise: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Half-width of uniform noise added to the target features that the drafter reads (EAGLE: 0.1)."""
    checkpoint_steps: bool = False
    """Compute each draft step's activations again in the backward pass instead of keeping them: less memory
    for one more forward pass of the drafter."""
    head_chunk: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Trained rows that meet the LM head at a time, each with V float32 scores; none: as many as fill 64 MB,
    and no fewer than 256, below which the products get slow."""
    drafter: DrafterOptions = field(default_factory=DrafterOptions)
    loss: LossConfig = field(default_factory=LossConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)

    def __post_init__(self) -> None:
        weights = [self.loss.regression, self.loss.divergence_weight, self.loss.top_k_weight]
        if not any(weights) and not (self.alignment.weight and self.alignment.kind != "none"):
            raise CoralError(
                "every weight of the loss is 0, so nothing would be learnt; set loss.regression, say."
            )
