"""The quality gate: an accelerated text follows its instruction exactly where the plain text does.

A text is judged by its item's check (see `suites.follow_eval`); the verdicts on a method are a vector.
Where the equality check calls a text a near tie, which it does in bfloat16 and float16, they may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from coral.bench.records import Record
from coral.bench.results import Compared, Gate, read
from coral.suites import follow_eval
from coral.suites.follow_eval import DIMENSIONS, LANGUAGES, NAME, verdict

Read = Callable[[Sequence[int]], str]
"""The answer that these ids are, up to the end token."""


def gates_of(records: Iterable[Record], text_of: Read) -> list[Gate]:
    """The gate of each dtype and temperature in which items were written.

    Methods without a verdict of the equality check are left out: theirs are other random numbers or weights.
    """
    known = {item.id for item in follow_eval.items()}  # a user's own file may have the suite's name
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        if record.suite == NAME and record.prompt in known and record.verdict is not None:
            groups.setdefault((record.dtype, record.temperature), []).append(record)
    return [_gate(dtype, temperature, group, text_of) for (dtype, temperature), group in groups.items()]


def _gate(dtype: str, temperature: float, records: Sequence[Record], text_of: Read) -> Gate:
    items = {item.id: item for item in follow_eval.items()}
    judged: dict[tuple[str, bool], list[tuple[Record, bool]]] = {}
    for record in records:
        passed = verdict(items[record.prompt], text_of(record.tokens))
        judged.setdefault((record.method, record.coupled), []).append((record, passed))
    plain = {record.prompt: passed for record, passed in judged.pop(("plain", False), [])}
    return {
        "suite": NAME,
        "dtype": dtype,
        "temperature": temperature,
        "plain": plain,
        "compared": [_compared(*method, found, plain) for method, found in judged.items()],
    }


def _compared(
    name: str, coupled: bool, judged: Sequence[tuple[Record, bool]], plain: dict[str, bool]
) -> Compared:
    pairs = [(record, passed) for record, passed in judged if record.prompt in plain]
    texts = [record.verdict for record, _ in pairs]
    other = [record for record, passed in pairs if passed != plain[record.prompt]]
    return {
        "drafter": name,
        "coupled": coupled,
        "equal": texts.count("equal"),
        "near_tie": texts.count("near_tie"),
        "wrong": texts.count("wrong"),
        "identical": not other,
        "differs": [record.prompt for record in other if record.verdict != "near_tie"],
        "excused": [record.prompt for record in other if record.verdict == "near_tie"],
    }


def failures(path: Path) -> list[str]:
    """What does not hold, a sentence each, in the results at `path`.

    Raises:
        CoralError: they cannot be read.
    """
    gates = read(path).get("gates", [])
    found = [(gate, each) for gate in gates for each in gate["compared"]]
    if not found:
        return ["no drafter's texts were compared with plain decoding's"]
    return [
        f"{each['drafter']} is judged otherwise than plain decoding at {', '.join(each['differs'])} "
        f"({gate['dtype']}, T = {gate['temperature']:g})"
        for gate, each in found
        if each["differs"]
    ]


def markdown(gate: Gate) -> list[str]:
    """The score of the target by language and dimension, then each method beside plain decoding."""
    title = f"**{gate['suite']}, {gate['dtype']}, T = {gate['temperature']:g}**"
    columns = (*DIMENSIONS, "all")
    scores = [
        [x, *(_score(gate["plain"], x, dimension) for dimension in columns)] for x in (*LANGUAGES, "all")
    ]
    methods = [[_name(gate, each), _texts(each), _verdicts(each)] for each in gate["compared"]]
    little = (
        [] if any(gate["plain"].values()) else ["The target passes none, so that verdicts say little.", ""]
    )
    return [
        *(f"{title}: items that the target passes", "", *_table(["language", *columns], scores), ""),
        *(*_table(["method", "texts", "verdicts"], methods), ""),
        *little,
    ]


def _score(plain: dict[str, bool], language: str, dimension: str) -> str:
    found = [
        plain[item.id]
        for item in follow_eval.items()
        if item.id in plain and language in (item.language, "all") and dimension in (item.dimension, "all")
    ]
    return f"{sum(found)}/{len(found)}" if found else "-"


def _name(gate: Gate, each: Compared) -> str:
    if gate["temperature"] == 0:
        return each["drafter"]
    return f"{each['drafter']}, {'coupled' if each['coupled'] else 'not coupled'}"


def _texts(each: Compared) -> str:
    counts = [(each["equal"], "equal"), (each["near_tie"], "near ties"), (each["wrong"], "**wrong**")]
    return ", ".join(f"{count} {word}" for count, word in counts if count)


def _verdicts(each: Compared) -> str:
    parts = [f"**other at {', '.join(each['differs'])}**"] if each["differs"] else []
    if each["excused"]:
        parts.append(f"other at near ties: {', '.join(each['excused'])}")
    return "; ".join(parts) or "identical"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
