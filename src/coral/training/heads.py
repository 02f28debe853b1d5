"""Make a cheaper LM head for a trained drafter: a function for each kind.

Each writes the head into the drafter's directory, makes it the drafter's own and drops the trees that were
tuned to the head it replaces. The directory is locked meanwhile; whoever is stopped leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import Tensor

from coral.data.features import Rows, frequencies
from coral.drafters import checkpoint, tuned
from coral.drafters.heads import store
from coral.drafters.heads.groups import outside, split
from coral.drafters.heads.low_rank import factorise
from coral.drafters.heads.vocabulary import most_frequent, special_ids
from coral.errors import CoralError
from coral.locks import locked
from coral.progress import spinner
from coral.target.target import Target
from coral.training.factors import TUNING, second_moment, tune
from coral.training.head_loop import HeadConfig, drafts_of
from coral.training.router import train_router


@dataclass(frozen=True)
class StaticOptions:
    """What a static head is made of."""

    size: int | None = None
    """Ids that are kept; None: a quarter of the vocabulary."""


class StaticReport(NamedTuple):
    """What a static head holds."""

    ids: Tensor
    """int64 [K]."""
    share: float
    """The part of what the target wrote in the data that these ids are."""
    token_map: Path
    """The ids as SGLang reads them."""

    def __str__(self) -> str:
        held = f"{len(self.ids)} ids, which are {self.share:.2%} of what the target wrote"
        return f"{held}; token map for SGLang (--speculative-token-map): {self.token_map}"


def make_static(
    drafter: str | Path,
    target: Target,
    dataset: Rows,
    options: StaticOptions = StaticOptions(),
    console: Console | None = None,
) -> StaticReport:
    """Make a head of the ids that the target writes most.

    Raises:
        CoralError: the drafter is not this target's, or another process writes its directory.
    """
    with _making("static", drafter, target) as (directory, _):
        counts = frequencies(dataset, target.vocab_size)
        ids = most_frequent(counts, special_ids(target), options.size or target.vocab_size // 4)
        store.save(directory, "static", {"ids": ids.int()})
        token_map = store.save_token_map(directory, ids)
    return StaticReport(ids, float(counts[ids].sum() / counts.sum().clamp(min=1)), token_map)


@dataclass(frozen=True)
class RoutedOptions:
    """What a routed head is made of, and how its router is trained."""

    groups: int = 16
    active: int = 4
    """Groups that are multiplied for each level of a tree."""
    grouping: str = "kmeans"
    """How ids are split; see `drafters/heads/groups.py`."""
    core: int = 0
    """Most frequent ids that are always multiplied, in no group."""
    training: HeadConfig = field(default_factory=HeadConfig)


class RoutedReport(NamedTuple):
    """What a routed head holds, and how well its router was at the end."""

    groups: int
    active: int
    core: int
    """Ids of the core, which all special ids belong to, so there may be more than were asked for."""
    recall: list[float]
    """By draft step, the part of the target's mass that lies in the core and the active groups."""

    def __str__(self) -> str:
        core = f" beside a core of {self.core} ids" if self.core else ""
        recall = " ".join(f"{part:.1%}" for part in self.recall)
        return f"{self.active} of {self.groups} groups{core}, recall by draft step {recall}"


def make_routed(
    drafter: str | Path,
    target: Target,
    dataset: Rows,
    options: RoutedOptions = RoutedOptions(),
    console: Console | None = None,
) -> RoutedReport:
    """Split the vocabulary into groups and train a router for them.

    Raises:
        CoralError: as `make_static` and `train_router`; too many groups, an unknown grouping, or no updates.
        KeyboardInterrupt: SIGINT or SIGTERM arrived.
    """
    training = options.training
    if training.updates < 1:
        raise CoralError("a router that is not trained is of no use; ask for at least one of --updates.")
    with _making("routed", drafter, target) as (directory, network):
        counts = frequencies(dataset, target.vocab_size)
        frequent = most_frequent(counts, special_ids(target), options.core)
        weight = target.head_weight
        with nullcontext() if console is None else spinner("Grouping ids"):
            ids = split(options.grouping, options.groups, weight, counts, training.seed, frequent)
        router, recall = train_router(target, network, dataset, ids, options.active, training, console)
        tensors = {f"router.{name}": tensor for name, tensor in router.state_dict().items()}
        core = len(outside(ids, target.vocab_size))
        store.save(directory, "routed", {**tensors, "ids": ids.int()}, active=options.active, core=core)
    return RoutedReport(options.groups, options.active, core, recall)


@dataclass(frozen=True)
class LowRankOptions:
    """What a low-rank head is made of, and how its factors are tuned."""

    rank: int | None = None
    """None: an eighth of the hidden size."""
    rescored: int = 32
    """Likeliest ids of each node that are scored again by their real rows."""
    batches: int = 50
    """Batches of data that show where draft features lie."""
    training: HeadConfig = TUNING


class LowRankReport(NamedTuple):
    """What a low-rank head holds."""

    rank: int
    hidden_size: int
    rescored: int
    updates: int

    def __str__(self) -> str:
        tuned = f", tuned in {self.updates} updates" if self.updates else ""
        return f"rank {self.rank} of {self.hidden_size}, {self.rescored} ids rescored{tuned}"


def make_low_rank(
    drafter: str | Path,
    target: Target,
    dataset: Rows,
    options: LowRankOptions = LowRankOptions(),
    console: Console | None = None,
) -> LowRankReport:
    """Factorise the LM head where draft features lie, and tune the factors in `options.training.updates`.

    Raises:
        CoralError: as `make_static` and `tune`, or a rank above the hidden size.
        KeyboardInterrupt: SIGINT or SIGTERM arrived while the factors were tuned.
    """
    rank, training = options.rank or max(2, target.hidden_size // 8), options.training
    if rank > target.hidden_size:
        raise CoralError(f"rank {rank} is above the hidden size {target.hidden_size}; ask for less.")
    with _making("low_rank", drafter, target) as (directory, network):
        moment = second_moment(target, network, dataset, options.batches, training, console)
        weights = frequencies(dataset, target.vocab_size).float().add(1).sqrt()
        up, down = factorise(target.head_weight, moment, rank, weights)
        if training.updates:
            up, down = tune(target, network, dataset, up, down, training, console)
        store.save(directory, "low_rank", {"up": up, "down": down}, rescored=options.rescored)
    return LowRankReport(rank, target.hidden_size, options.rescored, training.updates)


class Maker(NamedTuple):
    """How a kind of head is made."""

    options: Any
    """A frozen dataclass; all its fields have defaults."""
    make: Callable[..., Any]
    """(drafter, target, dataset, options, console) -> a report, whose `str` says what was made."""

    @property
    def takes(self) -> set[str]:
        """What its options may say, those of its training among them."""
        names = {each.name for each in fields(self.options)}
        return names - {"training"} | ({"updates", "seed"} if "training" in names else set())

    def given(self, **values: Any) -> Any:
        """Its options with these values; the others keep their defaults."""
        own = {each.name for each in fields(self.options)}
        options = self.options(**{name: value for name, value in values.items() if name in own})
        rest = {name: value for name, value in values.items() if name not in own}
        return replace(options, training=replace(options.training, **rest)) if rest else options


MAKERS = {
    "routed": Maker(RoutedOptions, make_routed),
    "static": Maker(StaticOptions, make_static),
    "low_rank": Maker(LowRankOptions, make_low_rank),
}


@contextmanager
def _making(kind: str, drafter: str | Path, target: Target) -> Iterator[tuple[Path, Any]]:
    """A drafter's directory, locked, and the drafter in float32 beside its target."""
    directory = checkpoint.own_directory(drafter)
    with locked(directory):
        network = checkpoint.load(directory, target, device=target.device).float()
        drafts_of(network)  # refuses one that has no head before minutes of work
        yield directory, network
        tuned.forget(directory, kind)
