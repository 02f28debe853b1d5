"""What rows cost on this machine: those of a target's forward, and those of a draft step.

They are measured when they are first asked for, in about a second, and kept in ~/.cache/coral/costs for
this target, drafter, machine and number of threads. Where neighbours disturb, nothing is kept: costs are then
assumed, and measured another time.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import pairwise
from math import expm1
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

import torch
from pydantic import Field

from coral import json_file
from coral.decoding.sampling import Sampling
from coral.decoding.state import State, Unread
from coral.device import device_name
from coral.errors import CoralError
from coral.files import atomic_text, user_caches
from coral.json_file import STRICT, Seconds
from coral.tree import DraftTree, TreeSize

if TYPE_CHECKING:
    from coral.decoding.cycle import Proposer
    from coral.target.target import Target

ROWS = (1, 2, 4, 8, 16, 32, 64)
TOP_KS = (1, 4, 16)
SECONDS = 1.0
"""That measuring may take; 0: costs are assumed."""
_PREFIX = 64  # tokens in front of the rows
_ALIKE = 1.25  # a size is timed twice; the two differ by no more where the machine is quiet
_READ = 3  # rows of a text that the first draft step reads: about as many as a cycle accepts
_FIRST = 1.3  # of a row: what that step costs a text, for only the last of these rows has children
DEEP = 5
"""Levels of the deeper of two trees: a level's cost is a share of their difference."""

_Size = TypeVar("_Size")
Table = Annotated[dict[int, Seconds], Field(min_length=2)]


class Promise(NamedTuple):
    """What a cycle of one text is expected to bring and to take.

    tokens: that it emits. widths: nodes of its draft tree at each depth from 1 on; none: nothing is drafted.
    """

    tokens: float
    widths: Sequence[float]


@dataclass(frozen=True)
class RowCosts:
    """Times, in seconds or any other unit, by the number of rows.

    forward: of the target, one row among them. step: of a draft step, its LM head included.
    """

    __pydantic_config__ = STRICT
    forward: Table
    step: Table

    def seconds(self, live: int, promise: Promise) -> float:
        """A cycle of so many texts that draft alike. A level is drafted from the nodes of the one before, but
        for those of the last depth.
        """
        if not promise.widths:
            return at(self.forward, live)
        total = at(self.forward, live * (1 + sum(promise.widths))) + at(self.step, live * _FIRST)
        for width in filter(None, promise.widths[:-1]):
            drafted = -expm1(-live * width)  # as if texts had nodes there by chance
            total += drafted * at(self.step, live * width / drafted)
        return total

    def speed(self, live: int, promise: Promise) -> float:
        """Tokens a second of all of them."""
        return live * promise.tokens / self.seconds(live, promise)


PLAIN = Promise(1.0, ())
ASSUMED = RowCosts(
    {1: 1.0, 2: 1.02, 4: 1.06, 8: 1.35, 16: 2.3, 32: 4.3, 64: 8.3},
    {1: 0.04, 4: 0.13, 16: 0.4},
)
"""In plain steps: about what two cores with AVX-512 take for a small model."""


def at(table: Mapping[int, float], rows: float) -> float:
    """Linear between what was measured, and beyond it as between the last two."""
    known = sorted(table)
    below, above = next(((a, b) for a, b in pairwise(known) if rows <= b), (known[-2], known[-1]))
    share = max(0.0, (rows - below) / (above - below))
    return (1 - share) * table[below] + share * table[above]


def of(target: Target, proposer: Proposer | None = None) -> RowCosts:
    """What a target and its drafter cost: as it is kept, measured, or assumed.

    proposer: the drafter's own; without it its cost is assumed.
    """
    forward = _kept(_name(target), lambda: _forward(target))
    if forward is None:
        return ASSUMED
    step = None
    if proposer is not None:
        step = _kept(_name(target, proposer), lambda: _step(target, proposer))
    return RowCosts(forward, step or {n: forward[1] * share for n, share in ASSUMED.step.items()})


def note(target: Target, proposer: Proposer, costs: RowCosts) -> None:
    """Keep what was measured elsewhere, in seconds."""
    _keep(Kept(_name(target), costs.forward))
    _keep(Kept(_name(target, proposer), costs.step))


def _name(target: Target, proposer: Proposer | None = None) -> str:
    """What times depend on: the machine, and the sizes of the target, or of what drafts for it."""
    machine = f"{device_name(target.device)}, {torch.get_num_threads()} threads"
    sizes = f"{target.facts.num_layers} layers, head {' x '.join(map(str, target.head_weight.shape))}"
    model = f"{machine}, {target.name}, {target.precision}, {target.backend}, {sizes}"
    if proposer is None:
        return model
    drafter, head = getattr(proposer, "drafter", None), getattr(proposer, "head", None)
    config, read = getattr(drafter, "config", None), getattr(head, "num_bytes", 0)
    return f"{model}: {type(proposer).__name__} {config}, {type(head).__name__} of {read} bytes"


def _kept(name: str, measure: Callable[[], Table | None]) -> Table | None:
    """The table of this name, from the disk or measured; None: it cannot be measured now."""
    if SECONDS == 0:
        return None
    with suppress(CoralError):  # there is none, or it is damaged
        kept = json_file.read(_path(name), Kept, "")
        if kept.name == name:
            return kept.seconds
    if (table := measure()) is not None:
        _keep(Kept(name, table))
    return table


def _path(name: str) -> Path:
    return root() / f"{sha256(name.encode()).hexdigest()[:24]}.json"


@dataclass(frozen=True)
class Kept:
    """What a file holds: seconds by rows, and of what."""

    __pydantic_config__ = STRICT
    name: str
    seconds: Table


def entries() -> list[Kept]:
    """All that is kept and can be read."""
    found = []
    for path in sorted(root().glob("*.json")):
        with suppress(CoralError):
            found.append(json_file.read(path, Kept, ""))
    return found


def _keep(kept: Kept) -> None:
    """Write a table down. A disk that refuses is no error."""
    with suppress(CoralError):
        atomic_text(_path(kept.name), json.dumps(asdict(kept)) + "\n")


def root() -> Path:
    return (user_caches() or Path(tempfile.gettempdir())) / "coral" / "costs"


def clear() -> None:
    """Forget all costs."""
    shutil.rmtree(root(), ignore_errors=True)


def _forward(target: Target) -> Table | None:
    """Seconds of forwards, measured within about `SECONDS`; None: the machine is too busy to tell."""
    if target.context_length <= _PREFIX + 2 * max(ROWS):
        return None
    prefix = [target.vocab_size // 2] * _PREFIX
    plain, rows = min(forward_times(target, (1,), prefix, 3)[1]), [*ROWS]
    while len(rows) > 4 and 4 * plain * sum(at(ASSUMED.forward, n) for n in rows) > SECONDS:
        rows.pop()  # of a large target: what more rows cost follows from these
    one, other = (_fastest(forward_times(target, rows, prefix, 2)) for _ in range(2))
    return {n: min(one[n], other[n]) for n in rows} if _alike(one, other) else None


def _step(target: Target, proposer: Proposer) -> Table | None:
    """Seconds of draft steps, as `_forward`."""
    prefix = [target.vocab_size // 2] * _PREFIX
    one, other = (_fastest(draft_times(target, proposer, prefix, Sampling(), TOP_KS, 2)) for _ in range(2))
    if not _alike(one, other):
        return None
    times = {size: min(one[size], other[size]) for size in one}
    return {k: max(0.0, times[k, DEEP] - times[k, 1]) / (DEEP - 1) for k in TOP_KS}


def forward_times(
    target: Target, rows: Sequence[int], prefix: Sequence[int], repeats: int
) -> dict[int, list[float]]:
    """Seconds of target forwards over n draft nodes behind `prefix`, `repeats` for each n of `rows`."""
    state = State.begin(target, prefix, 1, max(rows))
    state.prefill(target, ())
    length, token = state.cache.length, state.tokens[-1]
    timed: dict[int, list[float]] = {n: [] for n in rows}
    for _ in range(repeats):  # sizes in turn, so that a slow moment of the machine hits all of them
        for n in rows:
            chain = DraftTree(torch.full((n,), token), torch.arange(-1, n - 1), torch.zeros(n))
            begin = perf_counter()
            logits, _ = target.verify([state.cache], [chain])
            logits[0][0, 0].item()
            timed[n].append(perf_counter() - begin)
            state.cache.keep(length)
    return timed


@torch.inference_mode()
def draft_times(
    target: Target,
    proposer: Proposer,
    prompt: Sequence[int],
    sampling: Sampling,
    top_ks: Sequence[int],
    repeats: int,
) -> dict[tuple[int, int], list[float]]:
    """Seconds of `propose` by top_k and levels, 1 or `DEEP`. All calls are about the same rows of one state.

    A verification precedes each, as in real cycles: it evicts the drafter's weights from the CPU's caches.
    """
    state = State.begin(target, prompt, DEEP + 1, sampling=sampling)
    state.prefill(target, proposer.layers)
    rows, features = state.unread.end, state.unread.features if proposer.layers else None
    proposer.propose([state], TreeSize(1, 1, 1))
    read = min(_READ, rows)
    times: dict[tuple[int, int], list[float]] = {(k, depth): [] for k in top_ks for depth in (1, DEEP)}
    for _ in range(repeats):
        for (k, depth), seconds in times.items():
            logits, _ = target.verify([state.cache], [DraftTree.root(state.tokens[-1])])
            state.cache.keep(rows)
            state.unread = Unread(rows - read, () if features is None else (features[-read:],))
            logits[0][0, 0].item()  # a GPU is waited for
            begin = perf_counter()
            (tree,) = proposer.propose([state], TreeSize(k, depth, 15))
            tree.scores[-1].item()
            seconds.append(perf_counter() - begin)
    return times


def _fastest(times: Mapping[_Size, list[float]]) -> dict[_Size, float]:
    return {n: min(seconds) for n, seconds in times.items()}


def _alike(one: Mapping[_Size, float], other: Mapping[_Size, float]) -> bool:
    return all(max(one[n], other[n]) <= _ALIKE * min(one[n], other[n]) for n in one)
