"""Properties that every draft tree has, whatever its shape."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import V, new_state, prompt_of, random_tree, root_path, tiny_target, tree_of

from coral.tree import best_nodes, merge

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tests")

trees = st.builds(random_tree, st.integers(1, 12), seed=st.integers(0, 10**6))


@given(trees)
def test_mask_is_the_ancestor_closure(tree):
    """Stops a node that sees a sibling, or misses an ancestor of an ancestor."""
    mask = tree.mask.int()
    assert mask.diagonal().all() and torch.equal(mask, mask.tril())
    assert torch.equal((mask @ mask).clamp(max=1), mask)
    for node in range(len(tree)):
        path = root_path(tree, node)
        assert mask[node].nonzero().flatten().tolist() == path
        assert tree.depth[node] == len(path) - 1
    assert torch.equal(mask.sum(-1), tree.depth + 1)


@st.composite
def pools(draw):
    """A pool without its root (parent -1), level by level, where no child scores above its parent."""
    scores, parents, level = [], [], [(-1, 0.0)]
    for _ in range(draw(st.integers(1, 4))):
        following = []
        for parent, score in level:
            for drop in draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0]), max_size=3)):
                following.append((len(scores), score - drop))
                scores.append(score - drop)
                parents.append(parent)
        level = following
    return torch.tensor(scores), parents


@given(pools(), st.integers(0, 20))
def test_best_nodes_are_closed_under_parents(pool, count):
    """Stops a child that is kept without its parent because their scores tie."""
    scores, parents = pool
    kept = best_nodes(scores, count).tolist()
    assert kept == sorted(set(kept)) and len(kept) == min(count, len(scores))
    assert all(parents[node] in kept for node in kept if parents[node] >= 0)
    left = [float(scores[node]) for node in range(len(scores)) if node not in kept]
    assert not left or not kept or max(left) <= min(float(scores[node]) for node in kept)


@given(trees, trees, st.integers(0, 24))
def test_merging_keeps_the_likeliest_paths(first, second, num_nodes):
    """Stops a node under the wrong parent, a path drafted twice, one that both trees have thought no likelier
    for it, and a likely node of one tree crowded out by the other's.
    """
    second.tokens[0] = first.tokens[0]
    paths: dict[tuple[int, ...], list[float]] = {}
    for tree in (first, second):
        for node in range(1, len(tree)):
            path = tuple(tree.tokens[root_path(tree, node)].tolist())
            paths.setdefault(path, []).append(float(tree.scores[node].exp()))
    wanted = {path: 1 - math.prod(1 - chance for chance in chances) for path, chances in paths.items()}
    merged = merge([first, second], num_nodes)
    found = {
        tuple(merged.tokens[root_path(merged, node)].tolist()): float(merged.scores[node].exp())
        for node in range(1, len(merged))
    }
    assert len(found) == len(merged) - 1 == min(num_nodes, len(wanted))
    assert found == pytest.approx({path: wanted[path] for path in found}, rel=1e-4)
    left_out = [chance for path, chance in wanted.items() if path not in found]
    assert not found or max(left_out, default=0) <= min(found.values()) * (1 + 1e-4)


@given(trees, st.data())
def test_walk_is_the_longest_path_that_the_target_says(tree, data):
    """Stops a walk that ends too early, goes on too far, or takes the wrong branch."""
    samples = samples_of(tree, data)
    said = [
        path
        for path in (root_path(tree, node) for node in range(len(tree)))
        if all(tree.tokens[child] == samples[parent] for parent, child in pairwise(path))
    ]
    longest = max(said, key=len)
    assert tree.walk(samples) == longest


def samples_of(tree, data):
    """What the target says after each node: often one of its children."""
    children = [
        [int(tree.tokens[i]) for i in range(1, len(tree)) if tree.parents[i] == n] for n in range(len(tree))
    ]
    return [data.draw(st.sampled_from([*tokens, 0])) for tokens in children]


@given(trees, st.data())
def test_order_of_nodes_changes_nothing(tree, data):
    """Stops output that depends on how the proposer numbers siblings."""
    samples = samples_of(tree, data)
    priority = data.draw(st.permutations(range(len(tree))))
    order = sorted(range(len(tree)), key=lambda node: [priority[i] for i in root_path(tree, node)])
    place = {node: i for i, node in enumerate(order)}
    parents = [place.get(int(tree.parents[node]), -1) for node in order]
    other = tree_of([int(tree.tokens[node]) for node in order], parents)
    other_path = other.walk([samples[node] for node in order])
    assert [order[node] for node in other_path] == tree.walk(samples)


@given(trees)
@settings(max_examples=15)
def test_logits_of_a_node_are_those_of_its_root_path(tree):
    """Stops a wrong position, a mask one column off, and a child that sees its sibling."""
    target, prompt = tiny_target(), prompt_of(6)
    state = new_state(target, [*prompt, int(tree.tokens[0])])
    state.prefill(target, (-1,))
    (logits,), _ = target.verify([state.cache], [tree])
    assert logits.shape == (len(tree), V)
    for node in range(len(tree)):
        line = [*prompt, *tree.tokens[root_path(tree, node)].tolist()]
        expected = target.head(target.states(torch.tensor([line])))[0, -1]
        torch.testing.assert_close(logits[node], expected, rtol=1e-4, atol=1e-4)
