"""The cache holds what a fresh prefill of the same tokens would hold, whatever was drafted in between."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    Bushes,
    Recorder,
    V,
    new_state,
    prompt_of,
    random_drafter,
    random_tree,
    root_path,
    tiny_target,
    write,
)

from coral.cache import KVCache
from coral.decoding.cycle import generate
from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import State
from coral.drafters.lookup import NGram
from coral.tree import TreeSize

TREE_SIZE = TreeSize(top_k=3, max_depth=4, num_nodes=8)
FAMILIES = ["llama", "mistral-sliding", "qwen2-sliding", "qwen3", "phi3-longrope", "olmo2", "gemma3"]


def assert_cache_is_fresh(target, state):
    """Keys and values of all layers equal those of a prefill in one piece."""
    fresh = new_state(target, state.tokens)
    fresh.prefill(target, (-1,))
    assert state.cache.length == fresh.cache.length == len(state.tokens) - 1
    for own, other in zip(state.cache.layers, fresh.cache.layers, strict=True):
        for mine, expected in ((own.keys, other.keys), (own.values, other.values)):
            torch.testing.assert_close(
                mine[:, :, : own.length], expected[:, :, : own.length], rtol=1e-4, atol=1e-4
            )


def take(target, states, trees, paths):
    """Verify the trees, then accept the given paths and a bonus token."""
    logits, features = target.verify([state.cache for state in states], trees)
    for state, tree, path, rows in zip(states, trees, paths, features, strict=True):
        state.has_read()
        follows = [9] * len(tree)
        for node, child in pairwise(path):
            follows[node] = int(tree.tokens[child])
        state.keep(tree, follows, rows)
    return logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_keep_leaves_what_a_prefill_would(kind):
    """Stops keys of rejected nodes that stay, and accepted ones moved to the wrong row."""
    target = tiny_target(kind)
    for seed in range(5):
        tree = random_tree(9, seed=seed)
        for path in [root_path(tree, node) for node in range(seed, 9, 2)]:
            state = new_state(target, [*prompt_of(7, seed=seed), int(tree.tokens[0])])
            state.prefill(target, (-1,))
            take(target, [state], [tree], [path])
            assert_cache_is_fresh(target, state)
            assert (state.unread.start, state.unread_tokens) == (7, state.tokens[8:])
            expected = target.states(torch.tensor([state.tokens]))[0, 7:-1]
            torch.testing.assert_close(state.unread.features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral-sliding", "qwen2-sliding"])
def test_three_packed_sequences_are_three_alone(kind):
    """Stops a sequence that sees its neighbour in the pack, and rows that are kept in the wrong cache."""
    target = tiny_target(kind)
    trees = [random_tree(size, seed=size) for size in (6, 1, 9)]
    prompts = [[*prompt_of(n, seed=n), int(t.tokens[0])] for n, t in zip((3, 12, 8), trees, strict=True)]
    paths = [root_path(tree, len(tree) - 1) for tree in trees]

    def states():
        return [new_state(target, prompt) for prompt in prompts]

    packed, alone = states(), states()
    for state in packed:
        state.prefill(target, (-1,))
    logits = take(target, packed, trees, paths)
    for i, state in enumerate(alone):
        state.prefill(target, (-1,))
        (expected,) = take(target, [state], trees[i : i + 1], paths[i : i + 1])
        torch.testing.assert_close(logits[i], expected, rtol=1e-4, atol=1e-4)
        unread = packed[i].unread
        torch.testing.assert_close(unread.features, state.unread.features, rtol=1e-4, atol=1e-4)
        assert (unread.start, packed[i].tokens) == (state.unread.start, state.tokens)
        assert_cache_is_fresh(target, packed[i])


@pytest.mark.parametrize("capacity", [1, 5, 64])
def test_grows_beyond_its_capacity(capacity):
    """Stops rows lost when the buffer is made anew, and a buffer that grows without bound."""
    target, prompt = tiny_target(), prompt_of(9)
    expected = write(target, None, [prompt], 20).texts
    state = State(list(prompt), 29, target.new_cache(capacity))
    for _ in generate(target, Bushes(expected), [state], TREE_SIZE):
        pass
    assert [state.tokens] == expected
    assert_cache_is_fresh(target, state)
    assert state.cache.capacity <= max(64, capacity)


def test_update_is_a_view():
    """Stops a copy of the whole cache in every forward, which would cost more than drafting saves."""
    cache = KVCache(1, 8)
    keys, values = cache.layers[0].update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 6))
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr()
    assert values.data_ptr() == cache.layers[0].values.data_ptr()
    assert keys.shape == (1, 2, 3, 4) and values.shape == (1, 2, 3, 6)


def finish(target, proposer, state):
    """Write to the end; returns the trees that were proposed on the way."""
    recorder = Recorder(proposer)
    for _ in generate(target, recorder, [state], TREE_SIZE):
        pass
    return recorder.trees[state.sequence_id]


PROPOSERS = {
    "plain": lambda target: Plain(),
    "ngram": lambda target: NGram(3),
    "feature": random_drafter,
}
TURNS = {
    "answer repeated": lambda text: [*text, *prompt_of(4)],
    "answer changed": lambda text: [*text[:-4], 1, 2, *prompt_of(9)],
    "prompt changed": lambda text: [*text[:5], *prompt_of(20, seed=2)],
    "nothing shared": lambda text: [(text[0] + 1) % V, *prompt_of(30, seed=3)],
    "shortened": lambda text: text[:7],
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("name", PROPOSERS)
def test_second_turn_is_that_of_a_fresh_start(name, turn):
    """Stops keys, draft keys or n-grams of the text that the new conversation does not hold."""
    target, sampling = tiny_target("qwen2-sliding"), Sampling(0.7, seed=2)
    proposer = PROPOSERS[name](target)
    state = new_state(target, prompt_of(9), 16, sampling)
    finish(target, proposer, state)
    tokens = TURNS[turn](state.tokens)
    state.continue_with(tokens, len(tokens) + 12)
    fresh = new_state(target, tokens, 12, sampling)
    trees = finish(target, proposer, state)
    assert trees == finish(target, PROPOSERS[name](target), fresh)
    assert state.tokens == fresh.tokens and state.written == fresh.written
    assert_cache_is_fresh(target, state)


@pytest.mark.parametrize("moment", ["between cycles", "verify", "keep"])
@pytest.mark.parametrize("name", PROPOSERS)
def test_interrupted_text_goes_on_as_if_nothing_had_happened(name, moment, monkeypatch):
    """Stops rows of an unfinished cycle (Ctrl-C behind the forward) from staying in the cache for good."""
    target, prompt = tiny_target(), prompt_of(9)
    expected = write(target, None, [prompt], 16).texts[0]
    proposer = PROPOSERS[name](target)
    state = new_state(target, prompt, 16)
    cycles = generate(target, proposer, [state], TREE_SIZE)
    next(cycles), next(cycles)
    with monkeypatch.context() as patch:
        if moment != "between cycles":
            owner = target if moment == "verify" else state.cache
            patch.setattr(owner, moment, interrupted(getattr(owner, moment)))
            with pytest.raises(KeyboardInterrupt):
                next(cycles)
    cycles.close()
    so_far = len(state.tokens)
    trees = finish(target, proposer, state)
    assert state.tokens == expected
    assert_cache_is_fresh(target, state)
    fresh = new_state(target, expected[:so_far], len(expected) - so_far)
    assert trees == finish(target, PROPOSERS[name](target), fresh)


def interrupted(method):
    """The same, but Ctrl-C is pressed when its work is done."""

    def run(*args):
        method(*args)
        raise KeyboardInterrupt

    return run


def rows_of(layers, count, width=2):
    """Keys and values of `count` rows for each layer, told apart by their numbers."""
    return [
        (
            torch.arange(count).view(1, 1, -1, 1).expand(1, 2, -1, width) + 100.0 * i,
            torch.ones(1, 2, count, width),
        )
        for i in range(layers)
    ]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("unlike", [False, True])
def test_a_path_is_kept_in_all_layers(apart, unlike):
    """Stops layers that lie in one tensor, and are moved at once, from missing a move when they grow, or when
    one of them has another shape and lies elsewhere.
    """
    cache = KVCache(3, 4, apart)
    for length in (3, 7, 30):  # beyond the room twice
        cache.keep(0)
        for i, (layer, rows) in enumerate(zip(cache.layers, rows_of(3, length), strict=True)):
            layer.update(*(part[..., :1] if unlike and i == 2 else part for part in rows))
        assert (cache.buffer.whole is None) == (apart or unlike)
        cache.keep(0, [0, 2])
        for i, layer in enumerate(cache.layers):
            assert layer.keys[0, 0, :2, 0].tolist() == [100.0 * i, 100.0 * i + 2]
            assert layer.values[0, :, :2].eq(1).all() and cache.length == 2


@given(st.sets(st.integers(1, 19)), st.integers(0, 3))
def test_rows_of_a_path_are_those_it_names(rows, start):
    """Stops rows that move together although they do not lie together, and one that is overwritten first."""
    cache = KVCache(2, 24)
    for layer in cache.layers:
        numbers = torch.arange(24.0)[None, None, :, None].expand(1, 2, 24, 3)
        layer.update(numbers, -numbers)
    path = [0, *sorted(rows)]
    cache.keep(start, path)
    wanted = [*range(start), *(start + row for row in path)]
    for layer in cache.layers:
        assert layer.keys[0, 1, : cache.length, 2].tolist() == wanted
        assert (-layer.values[0, 0, : cache.length, 0]).tolist() == wanted
