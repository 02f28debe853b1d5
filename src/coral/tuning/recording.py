"""Record what a drafter would draft at every position of a text that the target writes.

No tree changes the text. So each one is written once, by plain decoding, and at every position the drafter
grows, from the same features as in real decoding, one tree that is larger than any that is asked about;
smaller ones are cut from it (see `simulate`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coral.decoding.cycle import Proposer, generate
from coral.decoding.sampling import Sampling
from coral.decoding.state import State
from coral.device import CPU
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize


def everything(top_k: int, max_depth: int, min_gain: float) -> TreeSize:
    """A tree size that keeps every node that is grown."""
    return TreeSize(top_k, max_depth, top_k + (max_depth - 1) * top_k**2, min_gain)


POOL = everything(top_k=10, max_depth=10, min_gain=0.05)
"""What is recorded: no tree size that is compared on a CPU has a smaller `min_gain`."""


@dataclass(frozen=True)
class Text:
    """One text: n tokens that the target wrote, and the tree grown before each of them.

    room: how many tokens might have been written; n is smaller where the text ended by itself.
    """

    tokens: list[int]
    pools: list[DraftTree]
    room: int


class _Recorder:
    """Lets `proposer` grow its tree, keeps it, and proposes nothing."""

    def __init__(self, proposer: Proposer, pool: TreeSize) -> None:
        self.proposer, self.pool, self.pools, self.layers = proposer, pool, list[DraftTree](), proposer.layers

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        self.pools += [tree.to(CPU) for tree in self.proposer.propose(states, self.pool)]
        return [DraftTree.root(state.tokens[-1]) for state in states]


def record(
    target: Target,
    proposer: Proposer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    pool: TreeSize = POOL,
    progress: Callable[[], None] = lambda: None,
) -> list[Text]:
    """Write up to `max_new_tokens` after each prompt, one text after the other; its sequence id is its index.

    Args:
        proposer: a trained drafter's; what it proposes must depend on nothing but text and features.
        pool: what is grown at each position; see `everything`.
        progress: called once a text.
    """
    texts = []
    for index, prompt in enumerate(prompts):
        recorder, state = (
            _Recorder(proposer, pool),
            new_state(target, prompt, max_new_tokens, sampling, index),
        )
        for _ in generate(target, recorder, [state], pool):
            pass
        texts.append(Text(state.written, recorder.pools, max_new_tokens))
        progress()
    return texts


def new_state(
    target: Target, prompt: list[int], room: int, sampling: Sampling | None, index: int, nodes: int = 0
) -> State:
    """A text of up to `room` tokens that ends where the target ends it."""
    options = {"sampling": sampling or Sampling(), "sequence_id": index, "eos_ids": target.eos_ids}
    return State.begin(target, prompt, room, nodes, **options)
