"""All options of a training run. A recipe is a YAML file of these keys; three come with the package."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from coral import config
from coral.drafters.feature.alignment import AlignmentConfig
from coral.drafters.feature.losses import LossConfig
from coral.errors import CoralError

RECIPES = Path(__file__).parent / "recipes"

Number = Annotated[int, Field(ge=1, le=2**31)]
Part = Annotated[float, Field(ge=0, le=1)]


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
class OptimiserConfig:
    """The optimiser and its schedule, which is a function of the run's progress from 0 to 1."""

    matrices: Literal["adamw", "muon"] = "adamw"
    """How matrices learn; the rest learns with AdamW."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate; none: 1 / hidden size, that is 1.7e-3 at 576 and 2.4e-4 at 4096."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    warmup: Part = 0.02
    """Part of the run in which the learning rate rises."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after that."""
    final: Part = 0.02
    """Part of the peak learning rate at which cosine and linear decay end."""
    gradient_clip: Annotated[float, Field(gt=0, le=1e6)] = 0.5
    """Largest gradient norm."""


@dataclass(frozen=True)
class Limits:
    """When the run ends: at the first limit that is reached. They may change when a run is resumed."""

    updates: Number | None = None
    """Number of updates."""
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Passes over the data."""
    minutes: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Wall time. The schedule then follows the clock, so two such runs are not equal number for number."""


@dataclass(frozen=True)
class Reports:
    """How often to log, measure and save, and where to. They may change when a run is resumed."""

    log_every: Number = 10
    """Updates between two lines of metrics.jsonl."""
    acceptance_every: Annotated[int, Field(ge=0, le=2**31)] = 300
    """Updates between two measurements of the real acceptance length; 0 never measures."""
    checkpoint_minutes: Annotated[float, Field(ge=0, le=1e9)] = 5.0
    """Minutes between two checkpoints."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio", "all"] = "none"
    """Where metrics go beside metrics.jsonl; all: to every one that is installed."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    recipe: str = "custom"
    """Name of the recipe, recorded in the checkpoint."""
    steps: Annotated[int, Field(ge=1, le=64)] = 3
    """Draft steps of the unroll."""
    detach: bool = True
    """Stop gradients between draft steps."""
    one_step: Part = 0.0
    """Part of the run, from its start, with one draft step only. Later steps build on the first, which learns
    three times as fast alone."""
    noise: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Half-width of uniform noise added to the target features that the drafter reads (EAGLE: 0.1)."""
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 16
    """Rows of the prepared data in one forward pass of one process."""
    accumulate: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Forward passes in one update."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 runs the drafter's products under autocast; weights and optimiser stay float32. auto: bfloat16
    beside a target of half precision, where the device multiplies it fast."""
    checkpoint_steps: bool = False
    """Compute each draft step's activations again in the backward pass instead of keeping them: less memory
    for one more forward pass of the drafter."""
    head_chunk: Number | None = None
    """Trained rows that meet the LM head at a time, each with V float32 scores; none: as many as fill 64 MB,
    and no fewer than 256, below which the products get slow."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order of the data and every other random draw."""
    drafter: DrafterOptions = field(default_factory=DrafterOptions)
    loss: LossConfig = field(default_factory=LossConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    limits: Limits = field(default_factory=lambda: Limits(epochs=10))
    reports: Reports = field(default_factory=Reports)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The recipe of this name or in this YAML file, with `group.key=value` overrides.

    Raises:
        CoralError: no such recipe, or a key or value that `coral.config.load` refuses, or one out of range.
    """
    path = RECIPES / f"{name_or_path}.yaml"
    if not path.exists():
        path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise CoralError(f"there is no recipe {str(name_or_path)!r}; give one of {known}, or a YAML file.")
    loaded = config.load(TrainConfig, path, overrides)
    check(loaded)
    return loaded


def check(c: TrainConfig) -> None:
    """Raise CoralError for a value that no run can use."""
    config.check(c)
    if all(limit is None for limit in (c.limits.updates, c.limits.epochs, c.limits.minutes)):
        raise CoralError("give one of limits.updates, limits.epochs or limits.minutes, above 0.")
    weights = [c.loss.regression, c.loss.divergence_weight, c.loss.top_k_weight]
    if not any(weights) and not (c.alignment.weight and c.alignment.kind != "none"):
        raise CoralError(
            "every weight of the loss is 0, so nothing would be learnt; set loss.regression, say."
        )
