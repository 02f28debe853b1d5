"""Do an engine and our own decoder agree on a drafter? What is counted, and what may differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coral.bench.equality import Verdict

EQUAL = 23 / 24  # of the texts; the rest may differ at a near tie
TAU_WITHIN = 0.01  # of ours
POSITION_WITHIN = 0.02  # of the cycles


@dataclass(frozen=True)
class Counts:
    """What chain drafting came to, over cycles that the end of a text did not cut.

    accepted_by_position: K numbers; the i-th is how many cycles had their draft token i accepted.
    """

    cycles: int
    accepted_by_position: list[int]

    @classmethod
    def of(cls, accepted: Iterable[int], draft_tokens: int) -> Counts:
        """From the number of accepted draft tokens of each cycle."""
        found = list(accepted)
        return cls(len(found), [sum(n > i for n in found) for i in range(draft_tokens)])

    @property
    def tau(self) -> float:
        return 1 + sum(self.accepted_by_position) / self.cycles if self.cycles else float("nan")

    @property
    def by_position(self) -> list[float]:
        """The share of cycles whose draft token i was accepted."""
        return [
            accepted / self.cycles if self.cycles else float("nan") for accepted in self.accepted_by_position
        ]


def judge(verdicts: Sequence[Verdict], ours: Counts, theirs: Counts) -> tuple[str, list[str]]:
    """One line of what was found, and what of it is too far apart; nothing: they agree.

    Args:
        verdicts: of each text of the engine against ours.
    """
    equal, wrong = verdicts.count("equal"), verdicts.count("wrong")
    near = len(verdicts) - equal - wrong
    tau_apart = abs(theirs.tau / ours.tau - 1)
    apart = max(abs(a - b) for a, b in zip(ours.by_position, theirs.by_position, strict=True))
    found = (
        f"{equal} of {len(verdicts)} texts equal ({near} near ties, {wrong} wrong), tau {theirs.tau:.3f} "
        f"against {ours.tau:.3f} here ({tau_apart:.2%} apart), acceptance by position within "
        f"{100 * apart:.2f} points"
    )
    # Written so that a number that is not one fails.
    held = {
        "texts": wrong == 0 and 0 < EQUAL * len(verdicts) <= equal,
        "tau": tau_apart <= TAU_WITHIN,
        "acceptance by position": apart <= POSITION_WITHIN,
    }
    return found, [name for name, holds in held.items() if not holds]
