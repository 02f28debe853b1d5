"""What results.json holds: the schema that a bench's results are read by, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from coral import json_file
from coral.errors import CoralError
from coral.json_file import OPEN, Count, Positive, Seconds
from coral.tree import TreeSize

Share = Annotated[float, Field(ge=0)]


class Tree(TypedDict):
    """A drafter's tree_size, and where it came from (see `api.choose_tree_size`)."""

    tree_size: TreeSize
    origin: str


class _Environment(TypedDict):
    hardware: str
    cores: Count | None
    threads: Count
    torch: str
    transformers: str
    scikit_learn: NotRequired[bool]
    cpu_features: dict[str, bool]


class _Settings(TypedDict):
    max_new_tokens: Count
    deepen: Count | None
    note: str
    ignore_eos: NotRequired[bool]  # benches of before there was a choice ignored them
    assistant: NotRequired[str | None]


class _Target(TypedDict):
    name: str
    layers: Count
    appended_ffn_width: Count | None


class _Costs(TypedDict):
    plain_seconds: dict[str, Seconds]


class _Head(TypedDict):
    groups: Count
    active: Count
    core: NotRequired[Count]
    recall: list[Share]


class _Row(TypedDict):
    kind: Literal["plain", "drafter", "peer"]
    drafter: str
    suite: str
    temperature: Seconds
    coupled: bool
    dtype: str
    tokens: Count
    seconds: Positive
    tokens_per_second: Share
    speedup: Share | None
    speedup_without_prefill: NotRequired[Share | None]
    speedup_over_hf: Share | None
    tau: Share | None
    tau_unrepeated: Share | None
    repeat_share: Share
    acceptance_by_depth: list[Share]
    draft_share: Share | None
    verify_share: Share | None
    near_tie: Count
    wrong: Count
    identical: bool | None
    c: Share | None
    nodes: Share | None
    draft_forwards: Share | None
    v: Share | None
    ceiling: Share | None


class Compared(TypedDict):
    """A method's texts on the items of a gate beside plain decoding's.

    equal, near_tie, wrong: texts, by the equality check. identical: every text is judged as the plain one is.
    differs, excused: ids of items judged otherwise; of the excused the text is a near tie.
    """

    drafter: str
    coupled: bool
    equal: Count
    near_tie: Count
    wrong: Count
    identical: bool
    differs: list[str]
    excused: list[str]


class Gate(TypedDict):
    """The quality gate at one dtype and temperature. plain: whether plain decoding passes, by item."""

    suite: str
    dtype: str
    temperature: Seconds
    plain: dict[str, bool]
    compared: list[Compared]


class Results(TypedDict):
    """The content of results.json, as far as tables and plots read it."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    environment: _Environment
    command: str
    commit: str
    settings: _Settings
    skipped: list[str]
    target: _Target
    costs: dict[str, _Costs]
    rows: list[_Row]
    trees: NotRequired[dict[str, dict[str, Tree]]]
    routed_heads: NotRequired[dict[str, dict[str, _Head]]]
    gates: NotRequired[list[Gate]]


def read(path: Path) -> dict[str, Any]:
    """The results in the file `path`.

    Raises:
        CoralError: they cannot be read, or lack what their own rows refer to.
    """
    advice = "it holds no bench results: run `coral bench` first."
    json_file.read(path, Results, advice)
    results: dict[str, Any] = json_file.read(path, dict, advice)
    rows = results["rows"]
    sums = {_place(row) for row in rows if row["suite"] == "all"}
    for row in rows:
        if row["dtype"] not in results["costs"] or _place(row) not in sums:
            raise CoralError(
                f"{path} cannot be read ({row['drafter']} has rows without costs or sums); {advice}"
            )
    return results


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("kind", "drafter", "dtype", "temperature", "coupled"))
