"""All options of a training run. A recipe is a YAML file of these keys; five come with the package."""

from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from coral import config
from coral.drafters import kinds
from coral.errors import CoralError

RECIPES = Path(__file__).parent / "recipes"

Number = Annotated[int, Field(ge=1, le=2**31)]
Part = Annotated[float, Field(ge=0, le=1)]


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
    """What every training run is told; see `config_type` for one that trains drafters of some kind."""

    recipe: str = "custom"
    """Name of the recipe, recorded in the checkpoint."""
    kind: str = "feature"
    """Kind of the drafter, see `coral.drafters.kinds`."""
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 16
    """Rows of the prepared data in one forward pass of one process."""
    accumulate: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Forward passes in one update."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 runs the drafter's products under autocast; weights and optimiser stay float32. auto: bfloat16
    beside a target of half precision, where the device multiplies it fast."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights, the order of the data and every other random draw."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    limits: Limits = field(default_factory=lambda: Limits(epochs=10))
    reports: Reports = field(default_factory=Reports)


@cache
def config_type(kind: str) -> Any:
    """The dataclass of what a run that trains drafters of this kind is told: `TrainConfig`, and beside it the
    kind's own `Options`.

    Raises:
        CoralError: there is no such kind.
    """
    bases = kinds.find(kind).Options, TrainConfig
    return make_dataclass("TrainConfig", [("kind", str, kind)], bases=bases, frozen=True)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The recipe of this name or in this YAML file, with `group.key=value` overrides: a `config_type` of its
    kind.

    Raises:
        CoralError: no such recipe, or a key or value that `coral.config.load` refuses, or one out of range.
    """
    path = RECIPES / f"{name_or_path}.yaml"
    if not path.exists():
        path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise CoralError(f"there is no recipe {str(name_or_path)!r}; give one of {known}, or a YAML file.")
    loaded = config.load(lambda values: config_type(str(values.get("kind", "feature"))), path, overrides)
    check(loaded)
    return loaded


def check(c: TrainConfig) -> None:
    """Raise CoralError for a value that no run can use."""
    config.check(c)
    if all(limit is None for limit in (c.limits.updates, c.limits.epochs, c.limits.minutes)):
        raise CoralError("give one of limits.updates, limits.epochs or limits.minutes, above 0.")
