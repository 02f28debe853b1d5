"""Whole trees in one call against their slow twin, which drafts level by level."""

import random
import shutil

import pytest
import torch
from tiny import prompt_of, tiny_model, write

from coral.decoding.plain import Plain
from coral.decoding.sampling import Sampling
from coral.decoding.state import State, Unread
from coral.drafters.feature.native_drafting import NativeDrafter
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.drafters.feature.propose import Feature
from coral.drafters.heads.full import FullHead
from coral.drafters.heads.in_context import InContextHead
from coral.drafters.heads.static import StaticHead
from coral.target.target import Target
from coral.tree import TreeSize

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")

HEADS = {
    "full": FullHead,
    "static": lambda target: StaticHead(target, torch.arange(60, 3, -1)),
    "in context": lambda target: InContextHead(target, 40),
}
TREE_SIZES = [TreeSize(2, 5, 7, 0.15), TreeSize(3, 3, 30), TreeSize(8, 4, 12, 0.4), TreeSize(1, 1, 1)]


def as_bytes(weight):
    """Some weights [outputs, inputs] that bytes with a scale a row hold exactly: the native drafter's."""
    whole = (512 * weight.detach()).round().clamp(-127, 127)
    whole[:, 0] = 127
    return whole / 512


def pair(dtype=torch.float32, biased=False, **options):
    """A target with a drafter whose weights are as the native drafter rounds them."""
    model = tiny_model(
        vocab_size=67, hidden_size=32, head_dim=16, intermediate_size=96, max_position_embeddings=200
    )
    if biased:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(67))
    model.lm_head.weight = torch.nn.Parameter(as_bytes(model.lm_head.weight))
    target = Target(model.bfloat16().to(dtype))
    torch.manual_seed(4)
    drafter = Drafter(DrafterConfig.for_target(target.config, **options))
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.1, mean=float(parameter.dim() == 1))
        if parameter.dim() == 2:
            parameter.data = as_bytes(parameter)
    loud, quiet = (as_bytes(half) for half in drafter.fc.weight.chunk(2, dim=1))
    drafter.fc.weight.data = torch.cat([loud / drafter.config.embedding_scale, quiet], 1)
    return target, drafter.bfloat16().to(dtype).requires_grad_(False)


def proposers(target, drafter, head):
    fast, slow = (Feature(drafter, target, head(target)) for _ in range(2))
    assert fast._native is not None
    slow._native = None
    return fast, slow


def draft(target, proposer, tree_size, sampling, accepted, length=20):
    """The trees of four cycles behind a prompt, and the drafter's cache after them."""
    ids = prompt_of(length + 3 * accepted, 67)
    state = State(ids[:length], 150, target.new_cache(160), sampling, sequence_id=5)
    state.prefill(target, (-1,))
    features = target.states(torch.tensor([ids]))[0]
    trees = [proposer.propose([state], tree_size)[0]]
    for _ in range(3):
        n = len(state.tokens)
        state.tokens += ids[n : n + accepted]
        state.unread = Unread(n - 1, (features[n - 1 : n - 1 + accepted],))
        trees += proposer.propose([state], tree_size)
    cache = state.memory[proposer]
    return trees, [rows[:, :, : cache.length] for rows in cache.storage]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "fc_bias": True, "biased": True},
        {"normalised_feedback": True, "num_key_value_heads": 1, "embedding_scale": 2.0**-10},
    ],
    ids=["plain", "two layers and biases", "normalised, and halves of fc of two sizes"],
)
def test_trees_are_those_of_levels(head, options, monkeypatch):
    """Stops: a row of the cache that belongs to another row, branch or level; rotation at another position; a
    path that sees a sibling; other children, ranks, ties, noise, ids that compete or ends of growth; accepted
    rows that a later cycle does not find; rows of a long prompt that are read twice or not at all; and a half
    of fc that is rounded away beside the other.
    """
    monkeypatch.setattr("coral.drafters.recurrent.grower.Grower.pool", 12)
    target, drafter = pair(**options)
    for sampling in (Sampling(), Sampling(0.8, seed=9)):
        for tree_size in TREE_SIZES:
            for behind in ((1, 20), (4, 20), (2, 90)):
                fast, slow = proposers(target, drafter, HEADS[head])
                quick, quick_rows = draft(target, fast, tree_size, sampling, *behind)
                trees, rows = draft(target, slow, tree_size, sampling, *behind)
                for one, other in zip(quick, trees, strict=True):
                    assert one.tokens.tolist() == other.tokens.tolist()
                    assert one.parents.tolist() == other.parents.tolist()
                    assert one.num_forwards == other.num_forwards
                    torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(quick_rows, rows, rtol=1e-4, atol=3e-4)  # rows of 16 bits


def texts_at(target, features, ids, draw, count):
    """Sequences of the same ids that are read and unread up to places of their own."""
    samplings = Sampling(), Sampling(0.8, seed=9), Sampling(1.0, seed=3)
    texts = []
    for number in range(count):
        end = draw.randrange(2, len(ids) - 1)
        room, sampling = draw.randrange(2, 9), draw.choice(samplings)
        state = State(ids[: end + 1], end + 1 + room, target.new_cache(160), sampling, number)
        texts.append((state, features, draw.randrange(end)))
    return texts


def drafted_twice(proposer, texts, tree_size, together):
    """The trees of sequences whose caches have some rows, and those rows: all in one call, or one by one."""
    made = []
    for rounds in range(2):
        for state, features, read in texts:
            begin, end = (0, read) if rounds == 0 else (read, len(state.tokens) - 1)
            state.unread = Unread(begin, (features[begin:end],) if end > begin else ())
        states = [state for state, *_ in texts]
        calls = [states] if together else [[state] for state in states]
        made += [tree for call in calls for tree in proposer.propose(call, tree_size)]
    rows = [[part[:, :, : cache.length] for part in cache.storage] if cache.layers[0].is_made else []
            for state in states if (cache := state.memory.get(proposer))]  # fmt: skip
    return [tree.lists for tree in made], [tree.num_forwards for tree in made], rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_a_tree_is_the_same_whatever_grows_beside_it(head, dtype, monkeypatch):
    """Stops a row that reads another text's keys, features, head or noise, sums in another order beside other
    rows, and a text that ends its growth that ends or holds up another's.
    """
    monkeypatch.setattr(Feature, "pool", 12)
    target, drafter = pair(dtype, num_layers=2)
    ids = prompt_of(60, 67)
    features, draw = target.states(torch.tensor([ids]))[0], random.Random(5)
    for count in (1, 2, 3, 7, 16):
        for tree_size in TREE_SIZES:
            seed, found = draw.random(), []
            for together in (True, False):
                proposer, _ = proposers(target, drafter, HEADS[head])
                texts = texts_at(target, features, ids, random.Random(seed), count)
                found.append(drafted_twice(proposer, texts, tree_size, together))
            assert found[0][:2] == found[1][:2]
            for one, other in zip(found[0][2], found[1][2], strict=True):
                assert all(map(torch.equal, one, other))


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def test_threads_share_the_work(threads):
    """Stops buffers that are made for another number of threads, and parts that two or none of them do."""
    target, drafter = pair()
    trees = []
    for count in (1, 3):
        threads(count)
        fast, _ = proposers(target, drafter, FullHead)
        trees.append(draft(target, fast, TREE_SIZES[1], Sampling(), 4)[0])
    for one, other in zip(*trees, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.parents.tolist() == other.parents.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_stay_the_same(dtype, monkeypatch):
    """Stops a drafter that a compiled target does not find, or whose trees end behind the text's end; and
    number formats that are mixed up.
    """
    target, drafter = pair(dtype)
    fast = target.on("native")
    proposer = Feature(drafter, fast, HEADS["static"](target))
    calls, grow = [], NativeDrafter.grow
    monkeypatch.setattr(NativeDrafter, "grow", lambda *a: calls.append(1) or grow(*a))
    for sampling in (Sampling(), Sampling(1.0, seed=3), Sampling(1.0, top_p=0.8)):
        calls.clear()
        expected = write(fast, Plain(), [prompt_of(9)], 24, sampling).texts
        assert write(fast, proposer, [prompt_of(9)], 24, sampling, TREE_SIZES[0]).texts == expected
        assert bool(calls) != sampling.filters


def test_what_it_cannot_draft_is_left_to_levels():
    """Stops a drafter that is decoded wrongly in silence: sizes that fill no vector, another activation."""
    for options in ({"head_dim": 8}, {"hidden_act": "gelu"}):
        target, drafter = pair(**options)
        assert NativeDrafter.of(drafter, target) is None
