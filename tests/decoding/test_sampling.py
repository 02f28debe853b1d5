"""One sampler with keyed noise: what it draws, and what the draw may depend on."""

import math

import pytest
import torch
from tiny import V
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from coral.decoding.sampling import _ROUGH, Sampling, _crossing, _gumbel, _rough_gumbel
from coral.errors import CoralError
from coral.native import sampler

EULER = 0.5772156649
POSITIONS, IDS = torch.arange(40, 80), torch.arange(500)
SAMPLING = Sampling(temperature=1.0, seed=7)


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch):
    """What follows is about torch's operations; test_sampler.py compares the native ones with them."""
    monkeypatch.setattr(sampler, "_loaded", [])


def noise(seed=7, sequence_id=3, positions=POSITIONS, ids=IDS):
    return Sampling(1.0, seed=seed).noise(positions, sequence_id, ids)


def random_logits(rows=64, dtype=torch.float32):
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_noise_does_not_depend_on_what_is_asked_with_it():
    """Stops noise drawn in sequence: another batch, order, chunk or set of ids would change the text."""
    whole = noise()
    order = torch.randperm(len(POSITIONS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(noise(positions=POSITIONS[order]), whole[order])
    assert torch.equal(torch.cat([noise(positions=p) for p in POSITIONS.split(7)]), whole)
    assert torch.equal(noise(ids=IDS[::3]), whole[:, ::3])
    assert torch.equal(noise(ids=IDS.flip(0).expand(len(POSITIONS), -1)), whole.flip(1))
    sequences = [3, 5] * (len(POSITIONS) // 2)
    mixed = noise(sequence_id=sequences)
    assert torch.equal(mixed[::2], whole[::2]) and torch.equal(mixed[1::2], noise(sequence_id=5)[1::2])
    assert torch.equal(noise(positions=POSITIONS.int(), ids=IDS.int()), whole)


def test_noise_is_the_same_in_every_release():
    """Stops a change of the hash, which would silently change every text written with a seed so far."""
    grid = noise(positions=torch.tensor([0, 41]), ids=IDS[:3]) * 2**16  # whole numbers by construction
    assert grid.tolist() == [[283478, 25326, 15602], [232000, -52938, 105142]]


def test_noise_has_gumbels_law():
    """Stops a uniform that is biased or reaches 0 or 1, and a sign error."""
    values = noise(positions=torch.arange(400)).double().flatten()
    assert values.isfinite().all()
    assert values.mean().item() == pytest.approx(EULER, abs=0.01)
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for x in (-1.0, 0.0, 1.0, 3.0, 6.0):
        assert (values <= x).double().mean().item() == pytest.approx(math.exp(-math.exp(-x)), abs=0.004)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"seed": 7 + 2**32},
        {"seed": 7 + 2**62},
        {"sequence_id": 4},
        {"sequence_id": 3 + 2**32},
        {"seed": 3, "sequence_id": 7},
        {"positions": POSITIONS + 1},
        {"ids": IDS + 1},
    ],
    ids=str,
)
def test_noise_is_another_for_every_key(other):
    """Stops two sequences, positions or seeds that draw alike (bound: 4 sigma, 0.028)."""
    pair = torch.stack([noise().flatten(), noise(**other).flatten()]).double()
    assert abs(torch.corrcoef(pair)[0, 1].item()) < 4 / math.sqrt(pair.shape[1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (5, 1.0), (1, 1.0), (V + 9, 1.0), (0, 0.8), (0, 0.01), (7, 0.6)]
)
def test_law_is_that_of_hugging_face(temperature, top_k, top_p):
    """Stops top-k and top-p in another order, or a nucleus that lacks the id which crosses top_p."""
    logits = random_logits()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits).softmax(-1)
    torch.testing.assert_close(Sampling(temperature, top_k, top_p).process(logits).softmax(-1), expected)
    positions = torch.arange(len(logits))
    tokens = Sampling(temperature, top_k, top_p).sample(logits, positions, 0)
    assert (expected[positions, tokens] > 0).all()


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_k": 90, "top_p": 0.99}], ids=str)
@pytest.mark.parametrize("rivals", [2, 8])
def test_sample_is_the_argmax_of_all_scores(spread, options, rivals, monkeypatch):
    """Stops a rough noise that decides, and a row whose rivals are too many from being left to it."""
    monkeypatch.setattr("coral.decoding.sampling._RIVALS", rivals)
    logits = spread * torch.randn(300, 400, generator=torch.Generator().manual_seed(2))
    sampling, positions = Sampling(0.9, seed=4, **options), torch.arange(300)
    expected = sampling.scores(logits, positions, 6).argmax(-1)
    assert torch.equal(sampling.sample(logits, positions, 6), expected)


def test_rough_noise_is_near_the_noise_everywhere():
    """Stops an id from losing because the rough noise is far off at an end of the range."""
    ends = torch.arange(1 << 16, dtype=torch.int32)
    bits = torch.cat([ends, ends << 8, 0xFFFFFF - ends])
    assert (_rough_gumbel(bits) - _gumbel(bits)).abs().max() < _ROUGH / 2


def test_a_nucleus_of_nothing_is_the_likeliest_id():
    """Stops an IndexError where float32 rounds top_p to 0."""
    logits = torch.randn(3, V)
    for top_p in (1e-46, 1e-300):
        kept = Sampling(1.0, top_p=top_p).process(logits) > -math.inf
        assert torch.equal(kept.nonzero()[:, 1], logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_is_the_same_however_many_ids_are_sorted(top_p):
    """Stops a row from being cut elsewhere when its nucleus is wider than what is sorted first."""
    logits = torch.tensor([[0.1], [1.0], [8.0]]) * torch.randn(
        3, 400, generator=torch.Generator().manual_seed(3)
    )
    whole = _crossing(logits, top_p, 400)
    assert all(torch.equal(_crossing(logits, top_p, count), whole) for count in (1, 5, 64, 399))


def test_temperature_zero_is_argmax():
    """Stops noise in greedy text, and filters that could break a tie another way."""
    logits = random_logits()
    for sampling in (Sampling(), Sampling(0.0, top_k=2, top_p=0.1, seed=9)):
        assert torch.equal(sampling.sample(logits, torch.arange(len(logits)), 0), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_logits_does_not_matter(dtype):
    """Stops noise or filters computed in half precision: equal logits must give equal tokens."""
    logits = random_logits(dtype=torch.float16 if dtype == torch.float64 else dtype)
    sampling, positions = Sampling(0.8, top_k=9, top_p=0.9, seed=2), torch.arange(len(logits))
    scores = sampling.scores(logits.to(dtype), positions, 4)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, sampling.scores(logits.float(), positions, 4))


def test_frequencies_of_many_draws():
    """Stops a law that is right on paper and wrong when drawn: one row, many positions (4 sigma)."""
    logits = random_logits(1)
    probs = Sampling(1.3, top_p=0.9).process(logits)[0].softmax(-1)
    draws = 20_000
    tokens = Sampling(1.3, top_p=0.9, seed=1).sample(logits.expand(draws, -1), torch.arange(draws), 5)
    frequencies = tokens.bincount(minlength=V) / draws
    assert ((frequencies - probs).abs() <= 4 * (probs * (1 - probs) / draws).sqrt() + 1e-12).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    """Stops NaN scores, whose argmax is id 0 for ever."""
    with pytest.raises(CoralError, match=f"{message} is"):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [1e-30, 1e-12, 1e300])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_extreme_temperatures_leave_numbers(temperature, options):
    """Stops: 1e-38, at which every logit is infinite, their differences no numbers and the answer empty."""
    logits = torch.tensor([[-3e4, 3e4, 2.9e4, 0.0] * 8])
    scores = Sampling(temperature, **options).scores(logits, torch.tensor([3]), 0)
    assert not scores.isnan().any() and scores.max().isfinite()
    if temperature < 1:
        assert scores.argmax() == logits.argmax()


def test_a_temperature_that_cannot_be_divided_by_is_refused():
    """Stops: an empty answer, exit code 0."""
    with pytest.raises(CoralError, match="which float32 cannot divide by; use 0"):
        Sampling(1e-38)
    for options, message in (
        ({"temperature": "hot"}, "must be a number"),
        ({"top_k": 2.5}, "whole number"),
    ):
        with pytest.raises(CoralError, match=message):
            Sampling(**options)
