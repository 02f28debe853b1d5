"""Whether one drafter accepts more than another on the same prompts, with an interval.

tau differs far more between prompts than between drafters, so the drafters are compared prompt by prompt
(paired) and prompts are what is drawn anew: B. Efron and R. Tibshirani, An Introduction to the Bootstrap,
1993, ch. 13. Drafters trained with several seeds are pooled, not drawn: the interval is about prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coral.bench.records import Record
from coral.errors import CoralError

DRAWS = 10_000
FEWEST = 6
"""Prompts for a verdict: of fewer, all differ in one direction by chance more often than in 5% of benches."""
SAME = ("target", "max_new_tokens", "ignore_eos", "tree_size", "seed")
"""Settings without which two taus are not comparable."""

Run = tuple[Mapping[str, Any], Sequence[Record]]
"""(header, records) of one bench output."""
Prompt = tuple[str, str]
"""(suite, prompt id): what is drawn. Its turns, and the seeds of its drafters, stay together."""


@dataclass(frozen=True)
class Interval:
    """A value measured over `prompts` prompts, and the bounds of its 95% bootstrap interval."""

    value: float
    low: float
    high: float
    prompts: int


@dataclass(frozen=True)
class Difference:
    """The advantage of FIRST over SECOND in one setting on one suite.

    tau: tau of FIRST minus that of SECOND. speed: seconds of SECOND over those of FIRST; None where no run
    measured both, for times of different runs are not comparable. left_out: prompts that not all have.
    same_trees: whether all drafters had the same tree size; otherwise the trees are part of what is compared.
    """

    dtype: str
    temperature: float
    coupled: bool
    suite: str
    tau: Interval
    speed: Interval | None
    left_out: int
    same_trees: bool = True

    @property
    def verdict(self) -> str:
        if self.tau.prompts < FEWEST:
            return "too few to say"
        if self.tau.low > 0:
            return "better"
        return "worse" if self.tau.high < 0 else "no difference shown"


def compare(
    first: Sequence[str], second: Sequence[str], runs: Sequence[Run], *, draws: int = DRAWS, seed: int = 0
) -> list[Difference]:
    """FIRST against SECOND in every (dtype, temperature, coupled) that all have, by suite and for `all`.

    Args:
        first, second: names of drafters (or of plain and ngram); several are pooled.
        runs: what `log.read` returns, of one or more bench outputs.

    Raises:
        CoralError: an unknown name, runs whose settings differ, or no prompt that all have.
    """
    _refuse_other_settings([header for header, _ in runs])
    names = {*first, *second}
    # Hugging Face's peers report no cycles.
    known = dict.fromkeys(record.method for _, records in runs for record in records if record.cycles)
    if unknown := sorted(names - set(known)):
        raise CoralError(f"no run holds a drafter {unknown[0]!r}; known are {', '.join(known) or 'none'}.")
    settings: dict[tuple[str, float, bool], list[list[Record]]] = {}
    own = [[record for record in records if record.method in names] for _, records in runs]
    drafted = any(record.kind == "drafter" for records in own for record in records)
    for index, records in enumerate(own):
        for record in records:
            # What has no noise to share is compared with drafters that share it and with those that do not.
            either = drafted and record.kind != "drafter" and record.temperature > 0
            for coupled in (True, False) if either else (record.coupled,):
                key = (record.dtype, record.temperature, coupled)
                settings.setdefault(key, [[] for _ in runs])[index].append(record)
    found = []
    for setting, chosen in settings.items():
        if {record.method for records in chosen for record in records} == names:
            trees = [header.get("trees", {}).get(setting[0], {}) for header, _ in runs]
            tree_sizes = {
                repr(tree["tree_size"]) for of in trees for name, tree in of.items() if name in names
            }
            found += [
                replace(difference, same_trees=len(tree_sizes) < 2)
                for difference in _differences(setting, first, second, chosen, draws, seed)
            ]
    if not found:
        raise CoralError(
            f"{', '.join(first)} and {', '.join(second)} have no prompt, dtype and temperature in common; "
            f"bench them on the same suites."
        )
    return found


def line(difference: Difference, first: str, second: str) -> str:
    """A difference in words."""
    d, tau = difference, difference.tau
    noise = "" if d.temperature == 0 else " coupled" if d.coupled else " not coupled"
    text = (
        f"{d.dtype} T={d.temperature:g}{noise} {d.suite}: {first} - {second}: {tau.value:+.2f} tau "
        f"[{tau.low:.2f}, {tau.high:.2f}] over {_prompts(tau.prompts)}: {d.verdict}"
    )
    if d.speed:
        text += f"; {d.speed.value:.2f}x as fast [{d.speed.low:.2f}, {d.speed.high:.2f}]"
    text += f"; {_prompts(d.left_out)} left out, not all have them" if d.left_out else ""
    return text + ("" if d.same_trees else "; their trees differ (give --tree to compare drafters alone)")


def _prompts(count: int) -> str:
    return f"{count} prompt" + "s" * (count != 1)


def interval(sums: NDArray[np.float64], how: str, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Percentile interval of a statistic of column sums, over draws of rows with replacement.

    Args:
        sums: a row for each prompt: [P, 4] as (tokens, cycles) of FIRST, then of SECOND, for how="difference"
            of tokens over cycles; [P, 2] as (seconds of FIRST, of SECOND) for how="ratio" of SECOND to FIRST.
    """
    count = len(sums)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    statistics = _statistic(np.vstack([np.ones(count), drawn]) @ sums, how)
    low, high = np.quantile(statistics[1:], (0.025, 0.975))
    return Interval(float(statistics[0]), float(low), float(high), count)


def _statistic(totals: NDArray[np.float64], how: str) -> NDArray[np.float64]:
    if how == "ratio":
        return totals[:, 1] / totals[:, 0]
    return totals[:, 0] / totals[:, 1] - totals[:, 2] / totals[:, 3]


def _differences(
    setting: tuple[str, float, bool],
    first: Sequence[str],
    second: Sequence[str],
    runs: Sequence[Sequence[Record]],
    draws: int,
    seed: int,
) -> list[Difference]:
    records = [record for members in runs for record in members]
    texts = _common(records)
    lengths: dict[Prompt, NDArray[np.float64]] = {}
    for record in records:
        if _text(record) in texts:
            sums = lengths.setdefault(_text(record)[:2], np.zeros(4))
            whole = [len(cycle.tokens) for cycle in record.cycles if not cycle.cut]  # as `rows.tau` counts
            for names, at in ((first, 0), (second, 2)):
                if record.method in names:
                    sums[at : at + 2] += (sum(whole), len(whole))
    # A prompt whose every cycle was cut by the end of its texts has no tau.
    lengths = {prompt: sums for prompt, sums in lengths.items() if sums[1] and sums[3]}
    seconds: dict[Prompt, NDArray[np.float64]] = {}
    for members in runs:
        _add_seconds(seconds, first, second, members)
    everything = {_text(record)[:2] for record in records}
    found = []
    for suite in [*dict.fromkeys(record.suite for record in records), "all"]:
        mine = [prompt for prompt in lengths if suite in (prompt[0], "all")]
        if not mine:
            continue
        tau = interval(np.array([lengths[prompt] for prompt in mine]), "difference", draws, seed)
        timed = [seconds[prompt] for prompt in mine if prompt in seconds]
        speed = interval(np.array(timed), "ratio", draws, seed) if timed else None
        left_out = sum(suite in (prompt[0], "all") for prompt in everything) - len(mine)
        found.append(Difference(*setting, suite, tau, speed, left_out))
    return found


def _add_seconds(
    seconds: dict[Prompt, NDArray[np.float64]],
    first: Sequence[str],
    second: Sequence[str],
    records: Sequence[Record],
) -> None:
    """Add one run's seconds, as a mean over the names of each side that this run measured."""
    present = {record.method for record in records}
    sides = [[name for name in dict.fromkeys(names) if name in present] for names in (first, second)]
    if not all(sides):
        return
    texts = _common(records)
    for record in records:
        if _text(record) in texts:
            sums = seconds.setdefault(_text(record)[:2], np.zeros(2))
            for at, side in enumerate(sides):
                if record.method in side:
                    sums[at] += record.seconds / len(side)


def _text(record: Record) -> tuple[str, str, int]:
    return (record.suite, record.prompt, record.turn)


def _common(records: Iterable[Record]) -> set[tuple[str, str, int]]:
    """The texts that every method among the records wrote."""
    written: dict[str, set[tuple[str, str, int]]] = {}
    for record in records:
        written.setdefault(record.method, set()).add(_text(record))
    return set.intersection(*written.values()) if written else set()


def _refuse_other_settings(headers: Sequence[Mapping[str, Any]]) -> None:
    for name in SAME:
        values = {repr(header["settings"].get(name)) for header in headers}
        if len(values) > 1:
            raise CoralError(
                f"the runs differ in {name} ({', '.join(sorted(values))}); compare runs of one setting."
            )
