"""One tree from two sources: text that occurred before, and what a drafter makes of the features.

Lookup costs nothing and drafts far ahead when the text repeats itself; a drafter knows how to go on when it
does not. Both say how likely their nodes are, so the likeliest of all make the tree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coral.decoding.generate import Proposer
from coral.decoding.inner import ask
from coral.decoding.state import Committed, State
from coral.device import CPU
from coral.tree import Budget, DraftTree, merge


class Merged:
    """Lookup drafts a chain, a drafter its tree; the likeliest nodes of both are verified.

    Where lookup alone promises `sure` tokens, the sum of its nodes' probabilities, the drafter is left out
    and reads later what it missed.
    """

    def __init__(self, drafter: Proposer, lookup: Proposer, sure: float = 4.0) -> None:
        self.drafter, self.lookup, self.sure = drafter, lookup, sure

    def propose(
        self, states: Sequence[State], committed: Sequence[Committed], budget: Budget
    ) -> list[DraftTree]:
        for state, rows in zip(states, committed, strict=True):
            if not isinstance(state.memory, _Memory):
                state.memory = _Memory()
            state.memory.waiting.append(rows)
        longest = replace(budget, top_k=1, max_depth=budget.num_nodes)
        trees = ask(self.lookup, "lookup", states, committed, longest)
        unsure = [i for i, tree in enumerate(trees) if sum(map(math.exp, tree.lists[2][1:])) < self.sure]
        rest = [states[i] for i in unsure]
        waiting = [Committed.joined(state.memory.waiting) for state in rest]
        for i, tree in zip(unsure, ask(self.drafter, "drafter", rest, waiting, budget), strict=True):
            states[i].memory.waiting.clear()
            trees[i] = merge([trees[i], tree.to(CPU)], budget.num_nodes) if len(trees[i]) > 1 else tree
        return trees


@dataclass
class _Memory:
    """Each proposer's own memory of a sequence, and what the drafter has yet to read."""

    lookup: Any = None
    drafter: Any = None
    waiting: list[Committed] = field(default_factory=list)
