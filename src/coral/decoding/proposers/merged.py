"""One tree from two sources: text that occurred before, and what a drafter makes of the features.

Lookup costs nothing and drafts far ahead when the text repeats itself; a drafter knows how to go on when it
does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from coral.decoding.generate import Proposer
from coral.decoding.state import Committed, State
from coral.decoding.tree import Budget, DraftTree, merge


class Merged:
    """What `lookup` drafts comes first, as a chain of up to `most` tokens; `drafter` has the nodes left."""

    def __init__(self, drafter: Proposer, lookup: Proposer, most: int = 7) -> None:
        self.drafter, self.lookup, self.most = drafter, lookup, most

    def propose(
        self, states: Sequence[State], committed: Sequence[Committed], budget: Budget
    ) -> list[DraftTree]:
        most = min(self.most, budget.num_nodes)
        budgets = Budget(top_k=1, max_depth=most, num_nodes=most), budget
        memories = [state.memory if isinstance(state.memory, list) else [None, None] for state in states]
        made = []
        for i, proposer in enumerate((self.lookup, self.drafter)):
            for state, memory in zip(states, memories, strict=True):
                state.memory = memory[i]
            made.append(proposer.propose(states, committed, budgets[i]))
            for state, memory in zip(states, memories, strict=True):
                memory[i] = state.memory
        for state, memory in zip(states, memories, strict=True):
            state.memory = memory
        return [merge(trees, budget.num_nodes) for trees in zip(*made, strict=True)]
