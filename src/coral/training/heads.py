"""Make a cheaper LM head for a trained drafter: a function for each kind.

Each writes the head into the drafter's directory, makes it the drafter's own and drops the trees that were
tuned to the head it replaces. The directory is locked meanwhile; whoever is stopped leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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


class StaticReport(NamedTuple):
    """What a static head holds."""

    ids: Tensor
    """int64 [K]."""
    share: float
    """The part of what the target wrote in the data that these ids are."""
    token_map: Path
    """The ids as SGLang reads them."""


def make_static(drafter: str | Path, target: Target, dataset: Rows, size: int | None = None) -> StaticReport:
    """Make a head of the `size` ids that the target writes most; a quarter of the vocabulary if not given.

    Raises:
        CoralError: the drafter is not this target's, or another process writes its directory.
    """
    with _making("static", drafter, target) as (directory, _):
        counts = frequencies(dataset, target.vocab_size)
        ids = most_frequent(counts, special_ids(target), size or target.vocab_size // 4)
        store.save(directory, "static", {"ids": ids.int()})
        token_map = store.save_token_map(directory, ids)
    return StaticReport(ids, float(counts[ids].sum() / counts.sum().clamp(min=1)), token_map)


@dataclass(frozen=True)
class RoutedOptions:
    """What a routed head is made of."""

    groups: int = 16
    active: int = 4
    """Groups that are multiplied for each level of a tree."""
    grouping: str = "kmeans"
    """How ids are split; see `drafters/heads/groups.py`."""
    core: int = 0
    """Most frequent ids that are always multiplied, in no group."""


class RoutedReport(NamedTuple):
    """What a routed head holds, and how well its router was at the end."""

    core: int
    """Ids of the core, which all special ids belong to, so there may be more than were asked for."""
    recall: list[float]
    """By draft step, the part of the target's mass that lies in the core and the active groups."""


def make_routed(
    drafter: str | Path,
    target: Target,
    dataset: Rows,
    options: RoutedOptions = RoutedOptions(),
    config: HeadConfig | None = None,
    console: Console | None = None,
) -> RoutedReport:
    """Split the vocabulary into groups and train a router for them.

    Raises:
        CoralError: as `make_static` and `train_router`; too many groups, or an unknown grouping.
        KeyboardInterrupt: SIGINT or SIGTERM arrived.
    """
    config = config or HeadConfig()
    with _making("routed", drafter, target) as (directory, network):
        counts = frequencies(dataset, target.vocab_size)
        frequent = most_frequent(counts, special_ids(target), options.core)
        weight = target.head_weight
        with nullcontext() if console is None else spinner("Grouping ids"):
            ids = split(options.grouping, options.groups, weight, counts, config.seed, frequent)
        router, recall = train_router(target, network, dataset, ids, options.active, config, console)
        tensors = {f"router.{name}": tensor for name, tensor in router.state_dict().items()}
        core = len(outside(ids, target.vocab_size))
        store.save(directory, "routed", {**tensors, "ids": ids.int()}, active=options.active, core=core)
    return RoutedReport(core, recall)


@dataclass(frozen=True)
class LowRankOptions:
    """What a low-rank head is made of."""

    rank: int | None = None
    """None: an eighth of the hidden size."""
    rescored: int = 32
    """Likeliest ids of each node that are scored again by their real rows."""
    batches: int = 50
    """Batches of data that show where draft features lie."""


def make_low_rank(
    drafter: str | Path,
    target: Target,
    dataset: Rows,
    options: LowRankOptions = LowRankOptions(),
    config: HeadConfig = TUNING,
    console: Console | None = None,
) -> int:
    """Factorise the LM head where draft features lie, and tune the factors in `config.updates`.

    Returns:
        The rank.

    Raises:
        CoralError: as `make_static` and `tune`, or a rank above the hidden size.
        KeyboardInterrupt: SIGINT or SIGTERM arrived while the factors were tuned.
    """
    rank = options.rank or max(2, target.hidden_size // 8)
    if rank > target.hidden_size:
        raise CoralError(f"rank {rank} is above the hidden size {target.hidden_size}; ask for less.")
    with _making("low_rank", drafter, target) as (directory, network):
        moment = second_moment(target, network, dataset, options.batches, config, console)
        weights = frequencies(dataset, target.vocab_size).float().add(1).sqrt()
        up, down = factorise(target.head_weight, moment, rank, weights)
        if config.updates:
            up, down = tune(target, network, dataset, up, down, config, console)
        store.save(directory, "low_rank", {"up": up, "down": down}, rescored=options.rescored)
    return rank


@contextmanager
def _making(kind: str, drafter: str | Path, target: Target) -> Iterator[tuple[Path, Any]]:
    """A drafter's directory, locked, and the drafter in float32 beside its target."""
    directory = checkpoint.own_directory(drafter)
    with locked(directory):
        network = checkpoint.load(directory, target, device=target.device).float()
        drafts_of(network)  # refuses one that has no head before minutes of work
        yield directory, network
        tuned.forget(directory, kind)
