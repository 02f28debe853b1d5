"""From records (one text each) to results (one line of a table each): every formula that a table prints.

Sums over sums throughout: tau is all tokens over all cycles, not a mean of means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coral.bench.costs import Costs
from coral.bench.records import Record
from coral.decoding.cycle import acceptance_length
from coral.decoding.state import Cycle

REPEAT = 10
"""Length of the n-gram that makes a token a repetition."""


def repeated(tokens: Sequence[int], n: int = REPEAT) -> list[bool]:
    """Which tokens lie inside an n-gram that the text already holds (that began earlier; overlap counts)."""
    marks, seen = [False] * len(tokens), set()
    for start in range(len(tokens) - n + 1):
        gram = tuple(tokens[start : start + n])
        if gram in seen:
            marks[start : start + n] = [True] * n
        seen.add(gram)
    return marks


def tau(cycles: Sequence[Cycle]) -> float | None:
    """Acceptance length; None when the text's end cut every cycle."""
    return acceptance_length(cycles) if any(not cycle.cut for cycle in cycles) else None


def unrepeated_cycles(cycles: Sequence[Cycle]) -> list[Cycle]:
    """The cycles of one text that begin outside repetition (where one begins is settled before it drafts)."""
    marks = repeated([token for cycle in cycles for token in cycle.tokens])
    kept, start = [], 0
    for cycle in cycles:
        if not marks[start]:
            kept.append(cycle)
        start += len(cycle.tokens)
    return kept


def acceptance_by_depth(cycles: Sequence[Cycle]) -> list[float]:
    """At depth d = 1, 2, ...: cycles whose path reaches d over those reaching d - 1 with a deeper tree."""
    rates: list[float] = []
    while True:
        depth = len(rates) + 1
        tried = [c.num_accepted >= depth for c in cycles if c.num_accepted >= depth - 1 and c.depth >= depth]
        if not tried:
            return rates
        rates.append(sum(tried) / len(tried))


def results_of(records: Sequence[Record], costs: Mapping[str, Costs]) -> list[dict[str, Any]]:
    """One result for each method, setting and suite, and one with suite `all` for each method and setting."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        for suite in (record.suite, "all"):
            group = (record.dtype, record.temperature, suite, record.kind, record.method, record.coupled)
            groups.setdefault(group, []).append(record)
    # Speedups compare texts that both methods wrote, so a half-finished bench is not skewed.
    bases = {(r.kind, r.method, *_text(r)): r for r in records if r.kind != "drafter"}
    return [_result(group, members, bases, costs) for group, members in groups.items()]


def _text(record: Record) -> tuple[Any, ...]:
    return (record.dtype, record.temperature, record.suite, record.prompt, record.turn)


def _result(
    group: tuple[Any, ...],
    records: list[Record],
    bases: Mapping[tuple[Any, ...], Record],
    costs: Mapping[str, Costs],
) -> dict[str, Any]:
    dtype, temperature, suite, kind, method, coupled = group
    tokens, seconds = sum(len(r.tokens) for r in records), sum(r.seconds for r in records)
    cycles = [cycle for r in records for cycle in r.cycles]
    calm = [cycle for r in records for cycle in unrepeated_cycles(r.cycles)]
    num_cycles = sum(r.num_cycles for r in records)
    marks = [mark for r in records for mark in repeated(r.tokens)]
    verdicts = [r.verdict for r in records]
    length = 1.0 if kind == "plain" else tau(cycles) if cycles else tokens / num_cycles
    nodes = sum(c.num_drafted + 1 for c in cycles) / len(cycles) if cycles and kind != "plain" else None
    forwards = sum(c.num_forwards for c in cycles) / len(cycles) if cycles else None
    c = costs[dtype].c.get(method)
    v = 1.0 if kind == "plain" else costs[dtype].v(nodes) if nodes is not None else None
    draft = 0.0 if not forwards else None if c is None else c * forwards
    return {
        "kind": kind,
        "drafter": method,
        "suite": suite,
        "temperature": temperature,
        "coupled": coupled,
        "dtype": dtype,
        "tokens": tokens,
        "cycles": num_cycles,
        "seconds": seconds,
        "prefill_seconds": sum(r.prefill_seconds for r in records),
        "tokens_per_second": tokens / seconds,
        "speedup": _speedup(records, ("plain", "plain"), bases),
        "speedup_without_prefill": _speedup(records, ("plain", "plain"), bases, prefill=False),
        "speedup_over_hf": _speedup(records, ("peer", "hf_generate"), bases),
        "tau": length,
        "tau_unrepeated": 1.0 if kind == "plain" else tau(calm),
        "repeat_share": sum(marks) / len(marks) if marks else 0.0,
        "acceptance_by_depth": [] if kind == "plain" else acceptance_by_depth(cycles),
        "draft_share": sum(c.draft_seconds for c in cycles) / seconds if cycles else None,
        "verify_share": sum(c.verify_seconds for c in cycles) / seconds if cycles else None,
        "equal": verdicts.count("equal"),
        "near_tie": verdicts.count("near_tie"),
        "wrong": verdicts.count("wrong"),
        "identical": None if None in verdicts else "wrong" not in verdicts,
        "c": c,
        "nodes": nodes,
        "draft_forwards": forwards,
        "v": v,
        "ceiling": None if length is None or v is None or draft is None else length / (v + draft),
    }


def _speedup(
    records: list[Record],
    base: tuple[str, str],
    bases: Mapping[tuple[Any, ...], Record],
    prefill: bool = True,
) -> float | None:
    """Tokens a second over those of the base. Hugging Face's samples may end elsewhere than ours."""
    pairs = [(own, bases[key]) for own in records if (key := (*base, *_text(own))) in bases]
    own, other = (_speed([pair[side] for pair in pairs], prefill) for side in (0, 1))
    return own / other if own and other else None


def _speed(records: Sequence[Record], prefill: bool) -> float:
    """Tokens a second; 0 where nothing took time."""
    seconds = sum(r.seconds - (0 if prefill else r.prefill_seconds) for r in records)
    return sum(len(r.tokens) for r in records) / seconds if seconds > 0 else 0.0
