"""Compiled forwards of fixed shapes against the eager ones, their slow twins."""

import pytest
import torch
from tiny import HEADS, Bushes, Recorder, prompt_of, random_drafter, tiny_target, write

from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.drafters.feature.propose import Feature
from coral.errors import CoralError
from coral.target.target import Target
from coral.tree import TreeSize

pytestmark = pytest.mark.slow  # what torch compiles takes it seconds each

TREE_SIZE = TreeSize(top_k=3, max_depth=3, num_nodes=6)


@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding", "mistral-sliding"])
def test_padded_forwards_write_the_same(kind, traced):
    """Stops: padding rows that are attended to, by the target or the drafter, a window lost in the padded
    mask, a cache that is left with other rows than an eager forward leaves, and compiling for every length.
    """
    target = tiny_target(kind)
    fast = target.on("graphs", (1, TREE_SIZE.num_nodes + 1))
    proposer = Feature(random_drafter(target).drafter, fast)
    bushes = Bushes([], target.vocab_size)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length, sampling in ((5, Sampling()), (9, Sampling(1.0, seed=3)), (14, Sampling())):
        bushes.texts = expected = write(target, Plain(), [prompt_of(length)], 24, sampling).texts
        for drafting in (Plain(), proposer, bushes):
            assert write(fast, drafting, [prompt_of(length)], 24, sampling, TREE_SIZE).texts == expected
        eager, padded = Recorder(random_drafter(target)), Recorder(proposer)
        for one, drafting in ((target, eager), (fast, padded)):
            write(one, drafting, [prompt_of(length)], 24, sampling, TREE_SIZE)
        assert padded.trees == eager.trees
    # Two sizes of the target and one of the drafter, whatever the length.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 3


@pytest.mark.parametrize("head", HEADS)
def test_every_head_drafts_the_same_compiled(head, traced):
    """Stops a head in a compiled draft step that meets padding, keeps the number of ids it was traced with
    (T > 0 wants more), or is compiled though it reads the text.
    """
    target = tiny_target()
    fast = target.on("graphs", (1, TREE_SIZE.num_nodes + 1))
    drafter = random_drafter(target).drafter
    eager, padded = (Recorder(Feature(drafter, t, HEADS[head](t))) for t in (target, fast))
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        for one, drafting in ((target, eager), (fast, padded)):
            write(one, drafting, [prompt_of(9)], 24, sampling, TREE_SIZE)
    assert padded.trees == eager.trees


def test_each_target_has_its_own_graphs(traced):
    """Stops a compiled forward that runs another model's graph, since guards on modules are dropped."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        target = Target(type(tiny_target().model)(tiny_target().model.config))
        expected = write(target, Plain(), [prompt_of(6)], 8).texts
        assert write(target.on("graphs", (1,)), Plain(), [prompt_of(6)], 8).texts == expected


def test_a_cpu_has_no_graphs():
    """Stops padded rows, which only a GPU makes up for, where native code takes any number of them."""
    with pytest.raises(CoralError, match="on a CPU use backend native or transformers"):
        tiny_target().on("graphs", (1,))
