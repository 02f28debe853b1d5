"""CUDA graphs without a GPU: recorded by torch's dispatcher, operation by operation, and run again."""

from copy import copy
from typing import Any

import pytest
import torch
from tiny import HEADS, Recorder, prompt_of, random_drafter, tiny_target, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.drafters.feature.propose import Feature
from coral.gpu import graphs
from coral.gpu.graphs import Replayed, steady
from coral.tree import TreeSize

TREE_SIZE = TreeSize(top_k=3, max_depth=3, num_nodes=6)


class Tape(TorchDispatchMode):
    """What a CUDA graph keeps: which operations ran, and on which memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a recording waits for nothing"
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch):
    """The tapes that take the place of CUDA graphs."""
    tapes = []

    def record(run):
        run()
        with Tape() as tape:
            returned = run()
        tapes.append(tape)
        return returned, tape.replay

    monkeypatch.setattr(graphs, "record", record)
    return tapes


def replaying(target, drafter, head=None):
    """The target and its proposer as they are on a GPU, but for the compiler."""
    fast = copy(target)
    fast._forward = fast.forward.only((1, TREE_SIZE.num_nodes + 1))
    fast._forward._decode = Replayed(fast._forward._forward_and_score, 5)
    proposer = Feature(drafter, fast, head)
    proposer._native, proposer._fixed = None, Replayed(proposer._fixed_step, 5)
    return fast, proposer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding", "mistral-sliding", "olmo2"])
def test_replayed_forwards_write_the_same(kind, recordings):
    """Stops a number of the first text that is baked into the graph, a length or slot that is not copied in,
    results that the next replay writes over, and a graph of one cache that writes to another.
    """
    target = tiny_target(kind)
    drafter = random_drafter(target).drafter
    fast, proposer = replaying(target, drafter)
    for length, sampling in ((5, Sampling()), (9, Sampling(1.0, seed=3)), (14, Sampling())):
        expected = write(target, Plain(), [prompt_of(length)], 24, sampling).texts
        eager, replayed = Recorder(Feature(drafter, target)), Recorder(proposer)
        eager.proposer._native = None
        write(target, eager, [prompt_of(length)], 24, sampling, TREE_SIZE)
        for drafting in (Plain(), replayed):
            assert write(fast, drafting, [prompt_of(length)], 24, sampling, TREE_SIZE).texts == expected
        assert replayed.trees == eager.trees
    assert recordings


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_every_head_drafts_behind_a_replayed_step(head, recordings):
    """Stops a head that keeps draft features which the next draft step writes over."""
    target = tiny_target()
    drafter = random_drafter(target).drafter
    _, proposer = replaying(target, drafter, HEADS[head](target))
    eager, replayed = Recorder(Feature(drafter, target, HEADS[head](target))), Recorder(proposer)
    eager.proposer._native = None
    for drafting in (eager, replayed):
        write(target, drafting, [prompt_of(9)], 24, Sampling(), TREE_SIZE)
    assert replayed.trees == eager.trees and recordings


def test_a_recording_serves_another_text_in_the_same_place(recordings):
    """Stops recording anew for each text, graphs that pile up or are used for a storage that has moved, and
    results that the next replay writes over.
    """

    def add(x, y, storage):
        storage += x
        return x + y, storage * 1

    replayed = Replayed(add, inputs=2, most=2)
    first, second, totals = torch.zeros(4), torch.zeros(4), []
    for storage, x, tapes in ((first, 1.0, 1), (first, 2.0, 1), (second, 3.0, 2), (first, 4.0, 2)):
        before = storage.clone()
        given = torch.full((4,), x)
        count = len(recordings)
        total, stored = replayed(given, torch.ones(4), storage)
        warm_ups = 3 * (len(recordings) - count)  # they write, too, as they do to the rows of a cache
        assert len(recordings) == tapes
        totals.append(total)
        assert storage.tolist() == (before + (1 + warm_ups) * x).tolist() == stored.tolist()
    assert [total.tolist() for total in totals] == [[x + 1] * 4 for x in (1.0, 2.0, 3.0, 4.0)]
    third = torch.zeros(4)
    replayed(torch.ones(4), torch.ones(4), third)  # the oldest goes: second
    replayed(torch.ones(4), torch.ones(4), first)
    assert len(recordings) == 3
    replayed(torch.ones(4), torch.ones(4), second)
    assert len(recordings) == 4


def test_what_waits_is_found(recordings):
    """Stops a recorder that lets everything through, which would make the tests above worthless."""
    waits = Replayed(lambda x, storage: x * float(x.sum()), inputs=1)
    with pytest.raises(AssertionError, match="waits for nothing"):
        waits(torch.ones(2), torch.ones(2))


def test_few_capacities():
    """Stops a recording for every length of a text."""
    assert [steady(n) for n in (1, 256, 257, 2048, 2049, 4097)] == [256, 256, 512, 2048, 4096, 6144]
