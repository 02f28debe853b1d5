"""Where the records of a regeneration went: what is counted, and how it is told."""

from dataclasses import dataclass, field
from typing import Any

from coral.data.conversations import Dropped


@dataclass(frozen=True)
class Outcome:
    """How a record ended: with an answer, or with a problem."""

    unfinished: bool = False
    problem: str = ""
    detail: str = ""
    digest: str = ""  # of the turns that were asked, in an earlier run; "" where it was not kept


@dataclass
class Regenerated:
    """Counts of where the records of the input went: input = written + skipped + failed."""

    written: int = 0
    unfinished: int = 0  # of those written: their last answer did not end
    answered: int = 0  # conversations and tokens that this run wrote, not earlier ones that it went on from
    tokens: int = 0
    seconds: float = 0.0
    skipped: Dropped = field(default_factory=Dropped)  # nothing was asked
    failed: Dropped = field(default_factory=Dropped)  # asked, without a usable answer
    again: int = 0  # of those failed: the same command would ask them again

    @property
    def input(self) -> int:
        return self.written + self.skipped.total + self.failed.total

    @property
    def speed(self) -> str:
        seconds = max(self.seconds, 1e-9)
        return f"{self.answered / seconds:,.1f} answers/s, {self.tokens / seconds:,.0f} tokens/s"

    def account(self) -> dict[str, Any]:
        """The counts as OUTPUT.account.json holds them."""
        return {
            "input": self.input,
            "written": self.written,
            "failed": dict(self.failed.counts.most_common()),
            "skipped": dict(self.skipped.counts.most_common()),
            "changed": dict(self.skipped.changed.most_common()),
            "unfinished": self.unfinished,
            "notes": self.failed.notes + self.skipped.notes,
        }

    def __str__(self) -> str:
        """The summary as a person reads it."""
        lines = [
            f"{self.input:,} records = {self.written:,} written + {self.skipped.total:,} skipped "
            f"+ {self.failed.total:,} failed",
            f"{self.unfinished:,} of those written end with an unfinished answer",
            f"{self.tokens:,} tokens in {self.seconds:,.0f} s, {self.speed}",
        ]
        for name, dropped in (("skipped", self.skipped), ("failed", self.failed)):
            lines += [f"  {name}: {count:,} x {reason}" for reason, count in dropped.counts.most_common()]
            lines += [f"    {note}" for note in dropped.notes]
        lines += [f"  changed: {count:,} x {what}" for what, count in self.skipped.changed.most_common()]
        if self.again:
            lines.append(f"the same command asks {self.again:,} of those failed again")
        return "\n".join(lines)
