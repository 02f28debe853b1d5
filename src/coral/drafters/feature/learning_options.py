"""What a recipe may say of such a drafter and of how it learns."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from coral.drafters.recurrent.unroll_options import UnrollOptions


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
class Options(UnrollOptions):
    """All of it."""

    noise: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Half-width of uniform noise added to the target features that the drafter reads (EAGLE: 0.1)."""
    drafter: DrafterOptions = field(default_factory=DrafterOptions)
