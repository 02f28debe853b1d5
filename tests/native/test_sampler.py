"""Choosing an id natively against its slow twin, torch's operations."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coral.decoding.sampling import Sampling
from coral.native import sampler

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
SHAPES = st.integers(1, 9), st.integers(1, 3000)
THREADS, SEEDS = st.integers(1, 4), st.integers(0, 2**31)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    kept = list(sampler._loaded)
    sampler.load()
    yield
    sampler._loaded[:] = kept


@settings(max_examples=100, deadline=None)
@given(
    *SHAPES,
    st.integers(1, 50),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    THREADS,
    SEEDS,
)
def test_the_largest_is_the_first_of_equals(rows, width, values, dtype, threads, seed):
    """Stops a tie that falls otherwise than in torch, and ends of rows or parts that are not looked at."""
    scores = -torch.randint(1, values + 1, (rows, width), generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )
    torch.set_num_threads(threads)
    try:
        assert sampler.argmax(scores).tolist() == [row.index(max(row)) for row in scores.tolist()]
        assert sampler.argmax(scores[:, ::2]).tolist() == [
            row.index(max(row)) for row in scores[:, ::2].tolist()
        ]
        assert sampler.argmax(scores.log()).max() < width  # NaN everywhere
    finally:
        torch.set_num_threads(1)


@settings(max_examples=200, deadline=None)
@given(*SHAPES, st.floats(0, 8), st.booleans(), THREADS, SEEDS, st.integers(0, 2**63))
def test_the_winner_is_that_of_all_scores(rows, width, spread, filtered, threads, seed, sequence_id):
    """Stops: a rival that is dropped too early, noise of another id, position or stream, ids that were
    filtered out, and parts of a row that no thread looks at. Equal scores: spread 0.
    """
    draw = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(rows, width, generator=draw)
    if filtered:
        scores[:, torch.arange(width) % 3 > 0] = -torch.inf
    positions = torch.randint(0, 2**20, (rows,), generator=draw)
    sampling = Sampling(1.0, seed=seed)
    ids = [sequence_id + i % 2 for i in range(rows)]
    expected = (scores + sampling.noise(positions, ids, torch.arange(width))).argmax(-1)
    torch.set_num_threads(threads)
    try:
        tokens = sampler.sample(scores, positions, [sampling.stream(i) for i in ids])
    finally:
        torch.set_num_threads(1)
    assert tokens is not None and torch.equal(tokens, expected)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, seed=3), Sampling(1.0, top_p=0.8)])
def test_sampling_asks_it(sampling, monkeypatch):
    """Stops the native code from being left aside, and scores that reach it unprocessed."""
    logits, positions = 3 * torch.randn(4, 500), torch.arange(4)
    native = sampling.sample(logits, positions, 5)
    monkeypatch.setattr(sampler, "_loaded", [])
    assert torch.equal(sampling.sample(logits, positions, 5), native)
    monkeypatch.setattr(sampler, "argmax", lambda scores: "asked")
    monkeypatch.setattr(sampler, "sample", lambda *a: "asked")
    assert sampling.sample(logits, positions, 5) == "asked"
