"""All that is known about kinds of drafters: what a module of one says of it, and their names.

A new kind is a module of this room that meets `Kind`, and its name in `KINDS`. The checkpoint, the training
loop, decoding, tuning and the bench know it through these functions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from coral.errors import CoralError

if TYPE_CHECKING:
    from coral.data.features import FeatureBatch
    from coral.decoding.cycle import Proposer
    from coral.decoding.state import State
    from coral.drafters.heads.store import Head
    from coral.target.target import Target
    from coral.tree import DraftTree, TreeSize

KINDS: tuple[str, ...] = ("feature", "eagle3", "lookup")


class Kind(Protocol):
    """What a module of a kind says of it."""

    Options: type
    """What a recipe may say of such a drafter and of how it learns: a frozen dataclass, all with defaults."""
    Config: type
    """What the checkpoint records of one: a frozen dataclass. Its `check_sizes(target)` raises CoralError for
    a target that such a drafter does not fit."""
    Drafter: type[nn.Module]
    """`Drafter(config)` has random weights; it says `kind`, the module's name, and `config`."""

    draft: Callable[[Any, FeatureBatch, int], Drafts] | None
    """(drafter, batch, S) -> what LM heads learn from in S draft steps; None: it has no LM head."""

    def layers(self, config: Any) -> tuple[int, ...]:
        """The target states that it reads, see `Target.verify`."""
        ...

    def inner(self, target: Any, options: Any) -> tuple[int, ...]:
        """The layers of the target whose states training reads beside the features, see `FeatureBatch.inner`,
        by `Options`. Raises CoralError for layers that the target does not have.
        """
        ...

    def engine_config(self, config: Any, dtype: torch.dtype) -> dict[str, Any] | None:
        """config.json beside its tensors, for other engines; None: none knows such a drafter."""
        ...

    def new(
        self, target: Any, options: Any, batch: FeatureBatch, seed: int, counts: Callable[[], Tensor]
    ) -> nn.Module:
        """A drafter that is to be trained: a function of the seed, of `Options`, of how large the states and
        embeddings in `batch` are, and of `counts`, which reads all data for how often the target writes each
        id, [V]. Raises CoralError for options that do not fit the target.
        """
        ...

    def learner(self, drafter: Any, config: Any) -> Learner | None:
        """What trains it, by `Options` and `precision` of a run's config; None: there is nothing to train."""
        ...

    def proposer(self, drafter: Any, target: Target, head: Head | None, coupled: bool) -> Proposer:
        """What decodes with it; the half of its code that decodes is imported here. No head: see `draft`."""
        ...


class Outcome(NamedTuple):
    """A batch's loss, summed over its trained rows, and what it is made of."""

    loss: Tensor
    """Scalar with gradient."""
    sums: dict[str, Tensor]
    """What is reported, float32 without gradient, the same names every time. Each is a sum over the trained
    rows of every draft step, [S], or a scalar over those of step 1. `rows` counts them, and `correct` those
    whose likeliest draft token is the target's."""


class Learner(Protocol):
    """An `nn.Module` that holds a drafter, so that distributed engines see one forward for one backward."""

    def count(self, batch: FeatureBatch) -> Tensor:
        """How many rows of a batch are trained in draft step 1, a scalar: the loss is divided by it."""
        ...

    def __call__(
        self,
        batch: FeatureBatch,
        head_weight: Tensor,
        head_bias: Tensor | None,
        generator: torch.Generator,
        progress: float = 1.0,
    ) -> Outcome:
        """The loss on a batch. `generator` (CPU) draws what is random; `progress` of the run is done."""
        ...


class Drafts(Protocol):
    """What LM heads learn from: R rows of a batch in S draft steps."""

    @property
    def drafts(self) -> Tensor:
        """Draft features, float32 [S,R,h]."""
        ...

    @property
    def features(self) -> Tensor:
        """The target's features of the same tokens, [R,h]."""
        ...

    @property
    def valid(self) -> Tensor:
        """bool [S,R], False where a row is not to be learnt from at that step."""
        ...


@runtime_checkable
class ReadsWeights(Protocol):
    """A `Proposer` whose draft steps read weights; the bench compares them with the target's."""

    @property
    def num_bytes(self) -> int:
        """Bytes that one draft step reads, those of an LM head included."""
        ...


@runtime_checkable
class DraftsByHead(Protocol):
    """A `Proposer` whose drafter has an LM head that was made for it; the bench looks at both."""

    drafter: nn.Module
    target: Target
    head: Head

    @property
    def layers(self) -> tuple[int, ...]: ...
    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]: ...


def find(kind: str) -> Kind:
    """The module of a kind.

    Raises:
        CoralError: there is no such kind.
    """
    if kind not in KINDS:
        raise CoralError(f"kind {kind!r} of drafters is not known; use {', '.join(KINDS)}.")
    return cast(Kind, import_module(f"coral.drafters.{kind}"))


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
