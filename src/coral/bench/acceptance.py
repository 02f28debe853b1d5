"""The real acceptance length of a drafter: decode, and count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coral.decoding.cycle import acceptance_length, generate
from coral.decoding.state import State
from coral.drafters.drafting import Drafting
from coral.target.target import Target
from coral.tree import TreeSize

CHAIN = TreeSize(top_k=1, max_depth=4, num_nodes=4)
TREE = TreeSize(top_k=6, max_depth=5, num_nodes=24)


def acceptance(
    target: Target, drafter: Any, prompts: Sequence[list[int]], max_new_tokens: int = 64
) -> dict[str, float]:
    """Greedy tau on `prompts` with a chain of four draft tokens and with a tree of 24.

    The drafter may be in another dtype than the target, as it is while it learns.
    """
    taus = {}
    target = target.on()  # as `coral generate` does
    proposer = Drafting(drafter, "full", fallback=False).proposer(target)
    for name, tree_size in (("chain", CHAIN), ("tree", TREE)):
        cycles = []
        for prompt in prompts:
            state = State.begin(target, prompt, max_new_tokens, tree_size.num_nodes, eos_ids=target.eos_ids)
            cycles += [cycle for (cycle,) in generate(target, proposer, [state], tree_size)]
        taus[name] = acceptance_length(cycles)
    return taus
