"""What a recipe may say of such a drafter and of how it learns."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from coral.drafters.recurrent.losses import LossConfig, Weight
from coral.drafters.recurrent.unroll_options import UnrollOptions
from coral.json_file import Id, Size


@dataclass(frozen=True)
class FusedOptions:
    """What the drafter is made of; sizes that are not given are the target's."""

    layers: tuple[Id, Id, Id] | None = None
    """Three layers of the target whose inputs are fused; none: 2, n // 2 and n - 3 of its n."""
    intermediate_size: Size | None = None
    """Width of the feed-forward block."""
    draft_vocab_size: Size | None = None
    """Ids that it can draft, those that the target writes most in the data; special ids and those that end a
    text are always among them. None: 32,000, or all where there are fewer."""
    fc_norm: bool = False
    """Norm each of the three states before they are fused (EAGLE-3.1). vLLM and SGLang know it, llama.cpp
    does not."""
    norm_output: bool = False
    """Feed the normed output back (EAGLE-3.1). vLLM and SGLang know it, llama.cpp does not."""
    init_drafter: str | None = None
    """Start from this drafter directory or hub id, which must be as the other options say."""


@dataclass(frozen=True)
class FusedLoss(LossConfig):
    """The losses of draft features once they are normed, on the draft vocabulary."""

    regression: Weight = 0.0
    divergence_weight: Weight = 1.0
    step_decay: Annotated[float, Field(ge=0, le=10)] = 0.8
    renormalised: bool = False
    """Bring the target's law to 1 on the draft vocabulary, and leave out rows whose likeliest token lies
    outside it (EAGLE-3). Otherwise the mass outside stays there: a row counts by what of it can be
    drafted."""


@dataclass(frozen=True)
class Options(UnrollOptions):
    """All of it."""

    steps: Annotated[int, Field(ge=1, le=64)] = 7
    detach: bool = False
    train_head: bool = True
    """Let the drafter's LM head learn, which starts from the target's rows."""
    aligned: Literal["normed", "output"] = "normed"
    """What `alignment` compares: what the LM head reads, or the layer's output."""
    drafter: FusedOptions = field(default_factory=FusedOptions)
    loss: FusedLoss = field(default_factory=FusedLoss)
