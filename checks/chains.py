"""Our own chain decoding, counted as engines count theirs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from coral.bench.methods import ours
from coral.decoding.cycle import Proposer, generate
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import State
from coral.target.target import Target
from coral.tree import TreeSize


def chain(
    target: Target,
    proposer: Proposer,
    prompt: list[int],
    length: int,
    draft_tokens: int,
    ends: Collection[int] = (),
) -> tuple[list[int], list[int]]:
    """Our greedy text of `length` tokens, or up to one of `ends`, and how many draft tokens each cycle had
    accepted.

    The first token of engines comes from the prefill and is no cycle; each later cycle drafts a whole chain
    and counts all that was accepted, also behind the end of the text. So the first token is written alone
    here, and drafting goes on as if the text had room for the last cycle's chain.
    """
    tree_size = TreeSize(top_k=1, max_depth=draft_tokens, num_nodes=draft_tokens)
    text = ours(target, Plain(), tree_size)(prompt, Sampling(), 0, 1).tokens
    end = len(prompt) + length + draft_tokens
    state = State([*prompt, *text], end, target.new_cache(end + draft_tokens + 1))
    accepted: list[int] = []
    cycles = generate(target, proposer, [state], tree_size)
    while len(text) < length and not set(text) & set(ends):
        (cycle,) = next(cycles)
        assert cycle.depth == draft_tokens and not cycle.cut
        text = [*text, *cycle.tokens]
        accepted.append(cycle.num_accepted)
    over = next((i + 1 for i, token in enumerate(text) if token in ends), length)
    return text[: min(over, length)], accepted


def shortened(accepted: Sequence[int], written: int, length: int, draft_tokens: int) -> list[tuple[int, int]]:
    """(drafted, accepted) of the same cycles as llama.cpp has them in a text of `written` tokens: no draft
    reaches past the `length` that was asked for, so the last token may come without one. Where an accepted
    token ends the text, what was drafted behind it is not looked at, and it counts as the target's own.
    """
    found, done = [], 1
    for number in accepted:
        drafted, left = min(draft_tokens, length - done - 1), written - done
        if drafted > 0:
            number = min(number, drafted)
            number = left - 1 if left <= number and left < drafted else min(number, left)
            found.append((drafted, number))
            done += number + 1
    return found
