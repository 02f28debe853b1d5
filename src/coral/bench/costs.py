"""What a plain step, a verification and a draft step cost here: the numbers that bound every speedup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

from pydantic import Field

from coral.bench.deepen import plain_bytes
from coral.bench.methods import Write, ours
from coral.decoding.plain import Plain
from coral.decoding.row_costs import forward_times
from coral.decoding.sampling import Sampling
from coral.json_file import Positive, Seconds
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize


@dataclass(frozen=True)
class Costs:
    """What one dtype costs on this machine.

    plain: the variant chosen as plain decoding; plain_seconds: seconds per token of all that competed.
    step_seconds: one plain step of the chosen variant; verify_seconds: one target forward of the drafters'
    target (the compiled one if any), by number of rows.
    c: bytes of weights that a draft step reads, its LM head included, over those of a plain step, by drafter.
    """

    dtype: str
    plain: str
    plain_seconds: dict[str, Seconds]
    step_seconds: Positive
    verify_seconds: Annotated[dict[int, Seconds], Field(min_length=1)]
    c: dict[str, Seconds]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def v(self, rows: float) -> float:
        """Time of verifying `rows` nodes over the time of a plain step, linear between measured sizes."""
        known = sorted(self.verify_seconds)
        above = next((n for n in known if n >= rows), known[-1])
        below = max((n for n in known if n <= rows), default=known[0])
        share = (rows - below) / (above - below) if above > below else 0.0
        low, high = self.verify_seconds[below], self.verify_seconds[above]
        return (low + share * (high - low)) / self.step_seconds


def measure(
    targets: Mapping[str, Target],
    drafts: Mapping[str, int],
    prompts: Sequence[list[int]],
    most_rows: int,
) -> Costs:
    """Measure all costs of a target in its dtype.

    Args:
        targets: the target by how it runs, "eager" and perhaps "compiled"; drafters verify with the last one.
        drafts: bytes of weights that a draft step reads, by drafter.
        most_rows: size of the largest tree, root included.
    """
    name, per_token = fastest_plain(plain_variants(targets), prompts)
    chosen = targets[name]
    target, longest = [*targets.values()][-1], max(prompts, key=len)
    sizes = {1, 2, most_rows, *(n for n in (4, 8, 12, 16, 24, 32, 48, 64) if n < most_rows)}
    timed = verify_seconds(target, sorted(sizes), longest)
    plain = plain_bytes(target.model)
    return Costs(
        dtype=target.precision,
        plain=name,
        plain_seconds=per_token,
        step_seconds=timed[1] if chosen is target else verify_seconds(chosen, [1], longest)[1],
        verify_seconds=timed,
        c={drafter: draft / plain for drafter, draft in drafts.items()},
    )


class RefusedTree(DraftTree):
    """A tree whose walk stops at the root, so that none of its nodes is accepted."""

    def walk(self, samples: list[int]) -> list[int]:
        return [0]


def plain_variants(targets: Mapping[str, Target]) -> dict[str, Write]:
    """Plain decoding by each way in which the target runs; the fastest becomes the baseline."""
    tree_size = TreeSize(top_k=1, max_depth=0, num_nodes=1)
    return {how: ours(target, Plain(), tree_size) for how, target in targets.items()}


def fastest_plain(
    variants: Mapping[str, Write], prompts: Sequence[list[int]], length: int = 32
) -> tuple[str, dict[str, float]]:
    """The fastest variant and each one's seconds per token; all write the same prompts in turn."""
    for write in variants.values():  # warm up
        write(prompts[0], Sampling(), 0, 4)
    seconds = dict.fromkeys(variants, 0.0)
    for prompt in prompts:
        for name, write in variants.items():
            seconds[name] += write(prompt, Sampling(), 0, length).seconds
    tokens = length * len(prompts)
    per_token = {name: total / tokens for name, total in seconds.items()}
    return min(per_token, key=per_token.__getitem__), per_token


def verify_seconds(
    target: Target, rows: Sequence[int], prefix: Sequence[int], repeats: int = 7
) -> dict[int, float]:
    """Median seconds of one target forward over n draft nodes behind `prefix`, for each n of `rows`."""
    timed = forward_times(target, rows, prefix, repeats + 1)
    return {n: median(times[1:]) for n, times in timed.items()}
