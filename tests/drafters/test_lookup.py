"""Prompt lookup: what it finds, what it thinks of it, and what a drafter does beside it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import V, new_state, prompt_of, random_drafter, soft_target

from coral.decoding.merged import Merged
from coral.decoding.state import State
from coral.drafters.lookup import NGram, _Index
from coral.tree import DraftTree, TreeSize

CHAIN = TreeSize(top_k=1, max_depth=4, num_nodes=4)


def longest(text: list[int]) -> int:
    """Of the text's end, the most that occurs earlier: looked for everywhere."""
    return max(
        (n for n in range(1, len(text)) if any(text[i - n : i] == text[-n:] for i in range(n, len(text)))),
        default=0,
    )


def looked_up(state: State, proposer: NGram, tree_size: TreeSize, written: list[int]) -> DraftTree:
    """What is drafted behind a text to which each of these tokens was added by a cycle of its own."""
    for token in [*written, None]:
        (tree,) = proposer.propose([state], tree_size)
        if token is not None:
            state.tokens.append(token)
    return tree


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 6),
)
def test_the_longest_match_is_found(text, prompt, question, max_n):
    """Stops a match that is followed although it ended, also in the next turn's question, one that is found
    in itself, and one of a place too early or too late.
    """
    index, prompt = _Index(max_n), min(prompt, len(text))
    begin, end_of_question = prompt + 4, prompt + 4 + question  # four tokens are written before it
    for length in range(prompt, len(text) + 1):
        if begin < length < end_of_question:
            continue
        index.extend(text[:length], end_of_question if length >= end_of_question else prompt)
        found, end = index.match
        assert text[end - found : end] == text[length - found : length] and (end < length or not found)
        assert min(found, max_n) == min(longest(text[:length]), max_n)


def test_a_node_is_as_likely_as_its_text_says():
    """Stops chances that a text's own hits and misses do not move, that count the prompt, or that a path's
    nodes do not multiply.
    """
    target, text = soft_target(V), [1, 2, 3, 4, 5, 6, 7, 8]
    first = looked_up(new_state(target, [*text, 1]), NGram(), CHAIN, [])
    assert first.tokens.tolist() == [1, 2, 3, 4, 5]
    assert first.scores.exp().tolist() == pytest.approx([1, 0.25, 0.25 * 0.5, 0.25 * 0.5**2, 0.2 * 0.5**2])
    repeated = looked_up(new_state(target, [*text, 1]), NGram(), CHAIN, [2, 3])
    assert repeated.tokens.tolist() == [3, 4, 5, 6, 7]
    hit = (3 * 0.5 + 1) / (3 + 1)  # behind a match of two
    assert repeated.scores.exp().tolist() == pytest.approx([1, hit, hit * 0.8, hit * 0.8**2, hit * 0.8**3])
    misled = looked_up(new_state(target, [*text, 1]), NGram(), CHAIN, [9, 1])
    miss = (3 * 0.25 + 0) / (3 + 1)  # behind a match of one
    assert misled.tokens.tolist() == [1, 9, 1, 9, 1]  # what was just written, going round
    assert float(misled.scores[1].exp()) == pytest.approx(miss)


def test_unlikely_levels_are_not_drafted():
    """Stops a `min_gain` that lookup ignores, and a second occurrence that takes more than the first left."""
    prompt = [1, 2, 3, 4, 1, 2, 5, 6, 7, 2]
    tree = looked_up(new_state(soft_target(V), prompt), NGram(), TreeSize(2, 3, 6), [])
    assert tree.tokens.tolist() == [2, 5, 6, 7, 3, 4, 1]  # the more recent first
    chances = tree.scores.exp().tolist()
    assert chances[4] == pytest.approx((1 - chances[1]) * 0.25)
    kept = looked_up(new_state(soft_target(V), prompt), NGram(), TreeSize(2, 3, 6, min_gain=0.1), [])
    assert kept.tokens.tolist() == [2, 5, 6, 3] and float(kept.scores.min().exp()) >= 0.1


class Watched:
    """Notes what a drafter is given to read."""

    def __init__(self, drafter) -> None:
        self.drafter, self.read, self.layers = drafter, [], drafter.layers

    def propose(self, states, tree_size):
        self.read += [(state.unread.start, state.unread_tokens) for state in states]
        return self.drafter.propose(states, tree_size)


def test_while_the_text_repeats_itself_the_drafter_rests_and_reads_later():
    """Stops drafting for text that lookup has already, and a drafter that never comes back or misses what was
    written meanwhile.
    """
    target = soft_target(V)
    prompt = prompt_of(5) * 6
    state = new_state(target, prompt, 60)
    drafter = Watched(random_drafter(target))
    merged, tree_size = Merged(drafter, NGram()), TreeSize(top_k=2, max_depth=3, num_nodes=6)
    state.prefill(target, merged.layers)
    forwards = []
    for cycle in range(4):  # what the target would write is played: the prompt again, in the third cycle not
        (tree,) = merged.propose([state], tree_size)
        forwards.append(tree.num_forwards)
        _, features = target.verify([state.cache], [tree])
        follows = [prompt[(len(state.tokens) + depth) % 5] for depth in tree.depth.tolist()]
        if cycle == 2:
            follows = [next(token for token in range(V) if token not in prompt)] * len(tree)
        state.keep(tree, follows, features[0])
    assert [count > 0 for count in forwards] == [False, False, False, True]
    (start, tokens), *others = drafter.read
    assert (start, tokens, others) == (0, state.tokens[1 : start + 1 + len(tokens)], [])
    assert len(tokens) == len(prompt) - 1 + 7 + 7 + 1  # seven of a cycle that goes on with the circle
