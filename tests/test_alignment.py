"""The alignment loss against its definition."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity

from coral.training.alignment import AlignmentConfig, alignment_loss

S, R, H = 3, 7, 8
CONFIG = AlignmentConfig(weight=1.0)


def inputs():
    generator = torch.Generator().manual_seed(0)
    drafts = torch.randn(S, R, H, generator=generator).requires_grad_()
    valid = torch.ones(S, R, dtype=torch.bool)
    valid[2, 3] = False
    return drafts, valid, torch.tensor([0, 0, 0, 0, 1, 1, 1])


def reference(drafts, valid, sequences, pairs, negatives):
    rows = [t for t in range(R) if valid[:, t].all()]
    losses = []
    for pair in pairs:
        for a, b in (pair, pair[::-1]):
            for t in rows:
                others = [u for u in rows if negatives == "batch" or sequences[u] == sequences[t]]
                scores = torch.stack([cosine_similarity(drafts[a, t], drafts[b, u], dim=0) for u in others])
                losses.append(-(scores / CONFIG.temperature).log_softmax(0)[others.index(t)])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("negatives", ["batch", "sequence"])
@pytest.mark.parametrize(
    ("pairs", "expected"),
    [("consecutive", [(0, 1), (1, 2)]), ("all", [(0, 1), (0, 2), (1, 2)]), ("anchor", [(0, 1), (0, 2)])],
)
def test_loss_equals_its_definition(pairs, expected, negatives):
    """Stops: invalid rows among the negatives, a direction left out, the wrong pairs of steps."""
    drafts, valid, sequences = inputs()
    loss = alignment_loss(drafts, valid, sequences, replace(CONFIG, pairs=pairs, negatives=negatives))
    torch.testing.assert_close(loss, reference(drafts, valid, sequences, expected, negatives))


def test_loss_is_least_when_steps_agree():
    """Stops: a sign error, and positives that are not the same row."""
    drafts, valid, sequences = inputs()
    agreeing = drafts[:1].expand(S, -1, -1)
    losses = [
        alignment_loss(agreeing + noise * torch.randn(S, R, H), valid, sequences, CONFIG).item()
        for noise in (0.0, 0.3, 3.0)
    ]
    moved = torch.stack([drafts[0], drafts[0].roll(1, 0), drafts[0].roll(2, 0)])
    assert all(a < b for a, b in pairwise(losses))
    assert losses[0] < alignment_loss(moved, valid, sequences, CONFIG)


def test_stop_gradient_teaches_the_later_step_only():
    """Stops: the better-informed early step being drawn towards the later one."""
    drafts, valid, sequences = inputs()
    alignment_loss(drafts, valid, sequences, replace(CONFIG, pairs="anchor", stop_gradient=True)).backward()
    assert drafts.grad[0].abs().max() == 0
    assert drafts.grad[1].abs().max() > 0 and drafts.grad[2].abs().max() > 0
    assert drafts.grad[:, 3].abs().max() == 0  # the row that is not valid at every step


def test_rows_are_drawn_from_the_generator_alone():
    """Stops: a draw from the global generator, which would make a resumed run differ."""
    drafts, valid, sequences = inputs()
    few = replace(CONFIG, max_rows=3)

    def drawn(seed):
        torch.rand(1)
        return alignment_loss(drafts, valid, sequences, few, torch.Generator().manual_seed(seed)).item()

    assert drawn(0) == drawn(0)
    assert len({drawn(seed) for seed in range(8)}) > 1


def test_one_row_has_nothing_to_be_told_from():
    """Stops: NaN from an empty mean."""
    drafts, valid, sequences = inputs()
    loss = alignment_loss(drafts[:, :1], valid[:, :1], sequences[:1], CONFIG)
    loss.backward()
    assert loss.item() == 0.0
