"""A proposer inside another one."""

from __future__ import annotations

from collections.abc import Sequence

from coral.decoding.generate import Proposer
from coral.decoding.state import Committed, State
from coral.tree import Budget, DraftTree


def ask(
    proposer: Proposer, memory: str, states: Sequence[State], committed: Sequence[Committed], budget: Budget
) -> list[DraftTree]:
    """The trees of a proposer whose own memory of a sequence is this attribute of the outer one's."""
    outer = [state.memory for state in states]
    for state, own in zip(states, outer, strict=True):
        state.memory = getattr(own, memory)
    try:
        return proposer.propose(states, committed, budget) if states else []
    finally:
        for state, own in zip(states, outer, strict=True):
            setattr(own, memory, state.memory)
            state.memory = own
