"""One file a kind of proposer; each has `propose(states, committed, budget) -> list[DraftTree]`."""
