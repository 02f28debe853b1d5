"""Candidates in place of the whole vocabulary, against the dense loss that they estimate."""

from dataclasses import replace

import pytest
import torch
from test_losses import CONFIG
from torch.nn.functional import linear

from coral.drafters.recurrent.candidates import choose
from coral.drafters.recurrent.losses import LossConfig, Wanted, draft_losses
from coral.drafters.recurrent.target_law import FrozenHead

S, R, H, V = 2, 12, 8, 400


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(R, H, generator=generator)
    drafts = features + 0.5 * torch.randn(S, R, H, generator=generator)
    weight = 0.6 * torch.randn(V, H, generator=generator)
    bias = torch.randn(V, generator=generator)
    tokens = torch.randint(V, (R,), generator=generator)
    return drafts, features, tokens, weight, bias


def drawn(features, tokens, weight, bias, size, seed=0):
    return choose(features, tokens, weight, bias, size, torch.Generator().manual_seed(seed), chunk=5)


def slope(drafts, features, tokens, weight, bias, config, certain=None):
    drafts = drafts.clone().requires_grad_()
    valid, before = torch.ones(S, R, dtype=torch.bool), torch.arange(R) - 1
    head = FrozenHead(weight, bias, len(weight) if certain is None else certain)
    losses = draft_losses(drafts, Wanted(features, valid, tokens, before), head, config, 7)
    return losses, torch.autograd.grad(losses.total.sum(), drafts)[0]


@pytest.mark.parametrize("with_bias", [False, True])
def test_candidates_are_the_batch_tokens_the_likeliest_and_some_of_the_rest(with_bias):
    """Stops a token of the batch that is left out, an id that comes twice, a weight that does not add up."""
    _, features, tokens, weight, bias = inputs()
    bias = bias if with_bias else None
    c = drawn(features, tokens, weight, bias, 80)
    assert len(c.ids) == len(c.ids.unique()) == 80 and c.certain == 60
    assert torch.equal(c.ids[c.places(tokens)], tokens)
    torch.testing.assert_close(c.weight, weight[c.ids])
    mass = linear(features, weight, bias).softmax(-1).sum(0)
    mass[tokens] = torch.inf
    assert set(c.ids[:60].tolist()) == set(mass.topk(60).indices.tolist())
    counts = (c.bias - (0 if bias is None else bias[c.ids])).exp()
    torch.testing.assert_close(counts[:60], torch.ones(60))
    torch.testing.assert_close(counts.sum(), torch.tensor(float(V)))


def test_every_other_id_is_drawn_as_often_as_any():
    """Stops a draw that prefers low ids or never reaches the last one."""
    _, features, tokens, weight, bias = inputs()
    counts = torch.zeros(V)
    for seed in range(600):
        c = drawn(features, tokens, weight, bias, 80, seed)
        counts[c.ids[c.certain :]] += 1
    others = counts[counts > 0]
    assert len(others) == V - 60
    expected = 600 * 20 / (V - 60)
    assert (others - expected).abs().max() < 5.5 * expected**0.5


@pytest.mark.slow
def test_normalisers_are_without_bias_and_slopes_nearly_so():
    """Stops weights that are forgotten, inverted or added to one of the two distributions only. The slope's
    bias is that of a ratio of means: it is small beside the spread of one draw and falls with the size.
    """
    drafts, features, tokens, weight, bias = inputs()
    config = LossConfig(regression=0.0, divergence_weight=1.0)
    _, dense = slope(drafts, features, tokens, weight, bias, config)
    exact = linear(drafts, weight, bias).logsumexp(-1)
    errors = {}
    for size in (80, 240):
        sums, slopes, logs = torch.zeros(S, R), torch.zeros_like(dense), torch.zeros(S, R)
        for seed in range(400):
            c = drawn(features, tokens, weight, bias, size, seed)
            scores = linear(drafts, c.weight, c.bias).logsumexp(-1)
            sums, logs = sums + (scores - exact).exp() / 400, logs + scores / 400
            places = c.places(tokens)
            slopes += slope(drafts, features, places, c.weight, c.bias, config, c.certain)[1] / 400
        torch.testing.assert_close(sums, torch.ones(S, R), rtol=0, atol=0.06)
        assert (logs <= exact + 0.02).all()  # the logarithm of a mean is no less than the mean of logarithms
        errors[size] = (slopes - dense).norm() / dense.norm()
    assert errors[240] < errors[80] < 0.1


@pytest.mark.parametrize("divergence", ["kl", "tv", "nla", "lk"])
def test_all_ids_are_the_dense_loss(divergence):
    """Stops an order of ids that reaches one side of the loss only."""
    drafts, features, tokens, weight, bias = inputs()
    config = replace(CONFIG, divergence=divergence)
    dense, expected = slope(drafts, features, tokens, weight, bias, config)
    c = drawn(features, tokens, weight, bias, 2 * V)
    assert c.certain == V
    places = c.places(tokens)
    losses, gradient = slope(drafts, features, places, c.weight, c.bias, config, c.certain)
    torch.testing.assert_close(losses.total, dense.total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert losses.correct.tolist() == dense.correct.tolist()


def test_a_perfect_drafter_has_no_slope_whatever_is_drawn():
    """Stops candidates that pull a drafter away from its target."""
    _, features, tokens, weight, bias = inputs()
    drafts = features.expand(S, R, H)
    c = drawn(features, tokens, weight, bias, 64)
    config = LossConfig(divergence_weight=1.0)
    losses, gradient = slope(drafts, features, c.places(tokens), c.weight, c.bias, config, c.certain)
    assert gradient.abs().max() < 1e-5
    assert losses.correct.tolist() == [R] * S  # a drawn id that counts often is no rival of the likeliest


def test_more_tokens_than_candidates():
    """Stops a batch of many different tokens from losing some of them."""
    _, features, _, weight, bias = inputs()
    tokens = torch.arange(100)[torch.randperm(100)]
    c = drawn(features, tokens, weight, bias, 16)
    assert c.certain == 100 and torch.equal(c.ids[c.places(tokens)], tokens)
