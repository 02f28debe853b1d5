"""One tree from two sources: text that occurred before, and what a drafter makes of the features.

Lookup costs nothing and drafts far ahead when the text repeats itself; a drafter knows how to go on when it
does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from coral.decoding.generate import Proposer
from coral.decoding.state import Committed, State
from coral.decoding.tree import Budget, DraftTree, merge


class Merged:
    """What `lookup` drafts comes first, as a chain of up to `most` tokens; `drafter` has the nodes left.

    While the text repeats itself the drafter only reads along: if the last cycle followed lookup's chain for
    `sure` tokens or more, and lookup goes on as far again, its chain has the tree alone.
    """

    def __init__(self, drafter: Proposer, lookup: Proposer, most: int = 7, sure: int = 4) -> None:
        self.drafter, self.lookup, self.most, self.sure = drafter, lookup, most, sure

    def propose(
        self, states: Sequence[State], committed: Sequence[Committed], budget: Budget
    ) -> list[DraftTree]:
        return [
            self._propose(state, rows, budget.within(state.remaining))
            for state, rows in zip(states, committed, strict=True)
        ]

    def _propose(self, state: State, committed: Committed, budget: Budget) -> DraftTree:
        memory = state.memory if isinstance(state.memory, _Memory) else _Memory()
        followed = _common(memory.chain, committed.tokens)
        longest = Budget(top_k=1, max_depth=budget.num_nodes, num_nodes=budget.num_nodes)
        chain, memory.lookup = _ask(self.lookup, state, memory.lookup, committed, longest)
        memory.chain = chain.tokens[1:].tolist()
        if min(followed, len(memory.chain)) >= self.sure:
            budget = replace(budget, max_depth=0)
        else:
            end = self.most + 1
            chain = DraftTree(chain.tokens[:end], chain.parents[:end], chain.scores[:end])
        tree, memory.drafter = _ask(self.drafter, state, memory.drafter, committed, budget)
        state.memory = memory
        return merge([chain, tree], budget.num_nodes)


@dataclass
class _Memory:
    """Each proposer's own memory of a sequence, and what lookup drafted last."""

    lookup: Any = None
    drafter: Any = None
    chain: list[int] = field(default_factory=list)


def _ask(
    proposer: Proposer, state: State, memory: Any, committed: Committed, budget: Budget
) -> tuple[DraftTree, Any]:
    """The tree of a proposer that finds its own memory in the state, and that memory."""
    state.memory = memory
    (tree,) = proposer.propose([state], [committed], budget)
    return tree, state.memory


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
