"""The chunked losses against the lines that define them."""

from dataclasses import replace

import dense as dense_formulation
import pytest
import torch
from tiny_training import tiny_drafter
from torch.nn.functional import linear, smooth_l1_loss

from coral.drafters.recurrent.drafted import trained_rows
from coral.drafters.recurrent.losses import LossConfig, Wanted, draft_losses
from coral.drafters.recurrent.target_law import FrozenHead, OwnHead
from coral.drafters.recurrent.unroll import unroll

S, R, H, V = 3, 13, 8, 31
CONFIG = LossConfig(regression=0.9, divergence_weight=0.3, top_k_weight=0.7, top_k=4, step_decay=0.8)


def inputs(bias, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(R, H, generator=generator)
    drafts = features + torch.randn(S, R, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    head_bias = torch.randn(V, generator=generator) if bias else None
    valid = torch.rand(S, R, generator=generator) > 0.3
    return drafts.to(dtype).requires_grad_(), features, valid, weight, head_bias


def losses_of(drafts, features, valid, weight, bias, config=CONFIG, chunk=512):
    tokens, before = torch.arange(len(features)) % V, torch.arange(len(features)) - 1
    wanted = Wanted(features, valid, tokens, before)
    return draft_losses(drafts, wanted, FrozenHead(weight, bias, V), config, chunk)


def dense(drafts, features, valid, weight, bias, divergence="kl"):
    p = linear(features, weight, bias).softmax(-1)
    log_q = linear(drafts, weight, bias).log_softmax(-1)
    top, ids = p.topk(CONFIG.top_k)
    cross_entropy, alpha = -(p * log_q).sum(-1), torch.minimum(p, log_q.exp()).sum(-1)
    hold = (-3 * alpha).exp().detach()
    compared = {
        "kl": cross_entropy,
        "tv": (p - log_q.exp()).abs().sum(-1) / 2,
        "nla": -alpha.log(),
        "lk": hold * cross_entropy + (1 - hold) * (1 - alpha),
    }[divergence]
    top_k = -(top * log_q.gather(-1, ids.expand(S, -1, -1))).sum(-1)
    regression = smooth_l1_loss(drafts, features.expand_as(drafts), reduction="none").mean(-1)
    loss = CONFIG.regression * regression + CONFIG.divergence_weight * compared + CONFIG.top_k_weight * top_k
    correct = (log_q.argmax(-1) == p.argmax(-1)) * valid
    return (loss * valid).sum(1) * CONFIG.step_decay ** torch.arange(S), correct.sum(1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("divergence", ["kl", "tv", "nla", "lk"])
def test_chunked_losses_and_gradients_equal_dense_ones(divergence, chunk, bias):
    """Stops: a hand-written gradient that is wrong, a chunk edge counted twice, masked rows that count."""
    drafts, features, valid, weight, head_bias = inputs(bias)
    config = replace(CONFIG, divergence=divergence)
    losses = losses_of(drafts, features, valid, weight, head_bias, config, chunk)
    (gradient,) = torch.autograd.grad(losses.total.sum(), drafts)
    total, correct = dense(drafts, features, valid, weight, head_bias, divergence)
    (expected,) = torch.autograd.grad(total.sum(), drafts)
    torch.testing.assert_close(losses.total, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert losses.correct.tolist() == correct.tolist()
    assert losses.rows.tolist() == valid.sum(1).tolist()


def test_a_perfect_drafter_has_no_slope():
    """Stops: a teacher shifted by a row or a top-K loss that is renormalised: its slope would not vanish."""
    _, features, valid, weight, _ = inputs(False)
    drafts = features.expand(S, R, H).clone().requires_grad_()
    full = LossConfig(top_k_weight=1.0, top_k=V)
    losses = losses_of(drafts, features, valid, weight, None, full)
    (gradient,) = torch.autograd.grad(losses.total.sum(), drafts)
    assert gradient.abs().max() < 1e-5
    assert losses.correct.tolist() == valid.sum(1).tolist()


def test_masked_rows_get_no_gradient():
    """Stops: prompt tokens trained on, through a mask that is dropped on the way to the loss."""
    generator = torch.Generator().manual_seed(2)
    embeddings, features = (torch.randn(2, 9, 16, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 5:7] = True
    outputs = unroll(tiny_drafter(), embeddings, features, None, S)
    for output in outputs:
        output.retain_grad()
    valid = trained_rows(mask, None, S)
    sequence, row = valid[0].nonzero(as_tuple=True)
    drafts = torch.stack([output[sequence, row] for output in outputs])
    weight = torch.randn(V, 16, generator=generator)
    losses_of(
        drafts, features[sequence, row + 1], valid[:, sequence, row], weight, None
    ).total.sum().backward()
    for output in outputs:
        trained = output.grad.abs().sum(-1).nonzero().tolist()
        assert trained == [[0, 3], [0, 4]]


def test_no_trained_row_is_no_error():
    """Stops: a batch of prompts only ending the run."""
    drafts, features, valid, weight, _ = inputs(False)
    losses = losses_of(drafts[:, :0], features[:0], valid[:, :0], weight, None)
    assert losses.total.tolist() == [0.0] * S
    losses.total.sum().backward()


def test_a_bfloat16_head_is_used_in_its_own_dtype():
    """Stops: a silent float32 copy of a large head, and buffers of the wrong dtype."""
    drafts, features, valid, weight, _ = inputs(False)
    rounded = losses_of(drafts, features, valid, weight.bfloat16(), None)
    rounded.total.sum().backward()
    exact = losses_of(drafts, features, valid, weight, None)
    torch.testing.assert_close(rounded.total, exact.total, rtol=0.05, atol=0.05)
    assert drafts.grad.dtype == torch.float32


@pytest.mark.parametrize("chunk", [4, 64])
def test_rows_that_decoding_would_not_reach_are_left_out(chunk):
    """Stops: hits read at the row itself instead of the row before, at the wrong step, or lost at a chunk's
    edge."""
    drafts, features, valid, weight, _ = inputs(False)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(V, (R,), generator=generator)
    before = torch.arange(R) - 1
    before[[0, 5]] = -1  # where an answer starts nothing was drafted before
    logits = linear(drafts.detach(), weight)
    rank = (logits > logits.gather(-1, tokens.expand(S, R).unsqueeze(-1))).sum(-1)
    reached = torch.ones(S, R, dtype=torch.bool)
    for step in range(1, S):
        for row in range(R):
            if before[row] >= 0:
                reached[step, row] = reached[step - 1, row - 1] and rank[step - 1, row - 1] < 6
    assert 0 < reached[2].sum() < reached[1].sum() < R
    everywhere = torch.ones_like(valid)
    config = replace(CONFIG, aligned_top=6)
    wanted = Wanted(features, everywhere, tokens, before)
    losses = draft_losses(drafts, wanted, FrozenHead(weight, None, V), config, chunk)
    (gradient,) = torch.autograd.grad(losses.total.sum(), drafts)
    expected, _ = dense(drafts, features, reached, weight, None)
    torch.testing.assert_close(losses.total, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(gradient.abs().sum(-1) > 0, reached)
    assert losses.rows.tolist() == [R] * S


@pytest.mark.parametrize("options", [{}, {"detach": False, "steps": 4}, {"alignment.max_rows": 8}])
def test_training_equals_the_dense_formulation(options):
    """Stops: a loss of ours that drifts from the published one, which it is measured against."""
    dense_formulation.check(**options)


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("divergence", ["kl", "tv", "nla", "lk"])
def test_a_head_of_the_drafters_own_learns_what_the_dense_formulas_say(divergence, renormalised, chunk):
    """Stops a gradient of the head that is wrong, steps that count alike, mass outside its ids that is given
    to those inside, a row that is to be left out and teaches.
    """
    drafts, features, valid, weight, bias = inputs(True)
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(19, H, generator=generator).requires_grad_()
    own_bias = torch.randn(19, generator=generator)
    config = replace(CONFIG, divergence=divergence)
    tokens, before = torch.arange(R) % V, torch.arange(R) - 1
    head = OwnHead(own, own_bias, 19, renormalised)
    losses = draft_losses(
        drafts, Wanted(features, valid, tokens, before), FrozenHead(weight, bias, V), config, chunk, head
    )
    law = linear(features, weight, bias).softmax(-1)
    p, kept = law[:, :19], valid
    inside = law.argmax(-1) < 19
    if renormalised:
        p, kept = p / p.sum(-1, keepdim=True), valid & inside
    log_q = linear(drafts, own, own_bias).log_softmax(-1)
    cross_entropy, alpha = -(p * log_q).sum(-1), torch.minimum(p, log_q.exp()).sum(-1)
    hold = (-3 * alpha).exp().detach()
    compared = {
        "kl": cross_entropy,
        "tv": 1 - alpha,
        "nla": -alpha.log(),
        "lk": hold * cross_entropy + (1 - hold) * (1 - alpha),
    }[divergence]
    top, ids = p.topk(config.top_k)
    top_k = -(top * log_q.gather(-1, ids.expand(S, -1, -1))).sum(-1)
    distance = smooth_l1_loss(drafts, features.expand_as(drafts), reduction="none").mean(-1)
    loss = config.regression * distance + config.divergence_weight * compared + config.top_k_weight * top_k
    expected = (loss * kept).sum(1) * config.step_decay ** torch.arange(S)
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.covered, (law[:, :19].sum(-1) * valid[0]).sum())
    assert losses.correct.equal(((log_q.argmax(-1) == p.argmax(-1)) & inside & valid).sum(1).float())
    made = torch.autograd.grad(3 * losses.total.sum(), (drafts, own))
    for gradient, wanted in zip(made, torch.autograd.grad(3 * expected.sum(), (drafts, own)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
