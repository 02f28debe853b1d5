"""A record: one text, as the log of a bench holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from coral.decoding.state import Cycle
from coral.json_file import Count, Id, Positive, Seconds, Size

KEY = ("dtype", "temperature", "coupled", "method", "suite", "prompt", "turn")
"""What says which text a record is."""


@dataclass(frozen=True)
class Record:
    """One turn of one prompt, written by one method.

    kind: plain, drafter or peer. coupled: drafting shared the sampler's noise (no meaning at temperature 0).
    verdict: equal, near_tie or wrong against plain decoding; None where the random numbers or the
    weights are not ours.
    """

    dtype: str
    temperature: Seconds
    coupled: bool
    kind: Literal["plain", "drafter", "peer"]
    method: str
    suite: str
    prompt: str
    turn: Count
    tokens: list[Id]
    seconds: Positive
    prefill_seconds: Seconds
    num_cycles: Size
    cycles: list[Cycle]
    verdict: Literal["equal", "near_tie", "wrong"] | None

    @property
    def key(self) -> tuple[object, ...]:
        """What is measured here; a bench that goes on skips the keys it holds."""
        return tuple(getattr(self, name) for name in KEY)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
