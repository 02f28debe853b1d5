"""Heads of fewer ids or a lower rank: what they keep they score as the full head does."""

import io
import signal

import pytest
import torch
from rich.console import Console
from tiny import V, routed_head, tiny_target
from tiny_training import tiny_data, tiny_drafter
from tiny_training import tiny_target as training_target

from coral.data.features import feature_batch
from coral.drafters.heads.full import FullHead
from coral.drafters.heads.in_context import InContextHead
from coral.drafters.heads.low_rank import LowRankHead, factorise
from coral.drafters.heads.static import StaticHead
from coral.drafters.recurrent.drafted import draft
from coral.training.factors import second_moment, tune
from coral.training.head_loop import HeadConfig


def features(rows=5):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))


def test_a_static_head_drafts_only_what_it_holds():
    """Stops positions among the kept ids handed out as ids."""
    target, ids = tiny_target(), torch.tensor([3, 30, 7, 11, 0])
    head, zeros = StaticHead(target, ids), torch.zeros(5)
    found, scores = head.topk(features(), 9, [], zeros)
    full = FullHead(target).log_probs(features())[:, ids].log_softmax(-1)
    values, best = full.topk(5)
    assert torch.equal(found, ids[best])
    torch.testing.assert_close(scores, values)
    torch.testing.assert_close(head.log_probs(features()).gather(1, found), scores)


@pytest.mark.parametrize("rescored", [0, 8])
def test_a_low_rank_head_of_full_rank_is_the_full_head(rescored):
    """Stops factors that are whitened and not turned back, and real scores on another scale than the rest."""
    target = tiny_target()
    up, down = factorise(target.head_weight, features(40).T @ features(40) / 40, 17, torch.rand(V))
    head, full = LowRankHead(target, up, down, rescored), FullHead(target)
    torch.testing.assert_close(head.log_probs(features()), full.log_probs(features()), atol=1e-4, rtol=1e-4)
    for k in (3, V + 5):
        ids, scores = head.topk(features(), k, [], torch.zeros(5))
        expected, values = full.topk(features(), k, [], torch.zeros(5))
        assert torch.equal(ids[:, :3], expected[:, :3])
        torch.testing.assert_close(scores, values, atol=1e-4, rtol=1e-4)


def test_heads_read_the_bytes_they_say():
    """Stops a ceiling of the bench that counts the full head for a cheaper one."""
    target = tiny_target()  # float32, 31 x 16
    up, down = factorise(target.head_weight, torch.eye(16), 4)
    assert FullHead(target).num_bytes == 31 * 16 * 4
    assert StaticHead(target, torch.arange(5)).num_bytes == 5 * 16 * 4
    assert LowRankHead(target, up, down).num_bytes == 4 * (31 + 16) * 4
    assert routed_head(target, 2, 4).num_bytes == (2 * 8 * 16 + 16 * 16 + 4 * 16) * 4
    assert routed_head(target, 2, 4, core=11).num_bytes == ((11 + 2 * 5) * 16 + 16 * 16 + 5 * 16) * 4
    assert InContextHead(target, 12).num_bytes == 12 * 16 * 4
    assert InContextHead(target).num_bytes == FullHead(target).num_bytes


def test_rescored_ids_have_their_real_scores():
    """Stops likely ids ranked by the approximation."""
    target = tiny_target()
    up, down = factorise(target.head_weight, torch.eye(16), 4)
    head = LowRankHead(target, up, down, rescored=12)
    ids, scores = head.topk(features(), 6, [], torch.zeros(5))
    real = target.head(features()).gather(1, ids)
    torch.testing.assert_close(real - real[:, :1], scores - scores[:, :1], atol=1e-5, rtol=1e-5)


def test_factors_spend_their_rank_where_features_lie():
    """Stops a decomposition of the bare weight, which ignores what the head is multiplied with."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(V, 16, generator=generator)
    few = torch.randn(200, 3, generator=generator) @ torch.randn(3, 16, generator=generator)
    up, down = factorise(weight, few.T @ few / 200, 4)
    torch.testing.assert_close(few @ down.T @ up.T, few @ weight.T, atol=1e-3, rtol=1e-3)


def test_tuning_brings_the_factors_to_the_targets_distribution():
    """Stops tuning on the rows of another token, the divergence turned round, and a drafter that learns."""
    target, data, drafter = training_target(), tiny_data(rows=24), tiny_drafter().eval()
    weights = [parameter.detach().clone() for parameter in drafter.parameters()]
    up, down = factorise(
        target.head_weight, second_moment(target, drafter, data.dataset, 3, HeadConfig(steps=2)), 5
    )

    def divergence(up, down):
        """Of each draft step, over all rows of the data, from the models alone."""
        batch, found = feature_batch(target, data.dataset, list(range(24))), []
        drafted = draft(drafter, batch, 2)
        law = (drafted.features @ target.head_weight.T).softmax(-1)
        for drafts, valid in zip(drafted.drafts, drafted.valid, strict=True):
            guess = (drafts @ down.T @ up.T).softmax(-1)
            found.append(float((law * (law / guess).log()).sum(-1)[valid].mean()))
        return found

    with torch.no_grad():
        before = divergence(up, down)
    console = Console(file=io.StringIO(), width=200)
    config = HeadConfig(updates=60, batch_size=8, steps=2, learning_rate=1e-2, log_every=20)
    tuned = tune(target, drafter, data.dataset, up, down, config, console)
    with torch.no_grad():
        after = divergence(*tuned)
    assert all(new < 0.8 * old for new, old in zip(after, before, strict=True))
    shown = [float(line.split()[-1]) for line in console.file.getvalue().splitlines()]
    assert len(shown) == 3 and shown[0] < 1.2 * max(before) and min(after) * 0.8 < shown[-1] < shown[0]
    assert all(torch.equal(old, new) for old, new in zip(weights, drafter.parameters(), strict=True))


def test_a_stop_ends_tuning_between_two_updates():
    """Stops a Ctrl-C that is swallowed, after which half-tuned factors would be saved."""
    target, data, drafter = training_target(), tiny_data(rows=8), tiny_drafter().eval()
    before = signal.getsignal(signal.SIGINT)

    class Stops(list):
        def __getitem__(self, index):
            signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    factors = factorise(target.head_weight, torch.eye(16), 4)
    with pytest.raises(KeyboardInterrupt):
        tune(target, drafter, Stops(data.dataset), *factors, HeadConfig(updates=9, steps=2))
    assert signal.getsignal(signal.SIGINT) is before
