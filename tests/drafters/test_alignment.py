"""The alignment loss against its definition."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity

from coral.drafters.recurrent.alignment import AlignmentConfig, alignment_loss

S, R, H = 3, 7, 8
CONFIG = AlignmentConfig(kind="csra")
TOKENS = torch.tensor([4, 4, 5, 6, 4, 7, 7])


def inputs():
    generator = torch.Generator().manual_seed(0)
    drafts = torch.randn(S, R, H, generator=generator).requires_grad_()
    valid = torch.ones(S, R, dtype=torch.bool)
    valid[2, 3] = False
    return drafts, torch.randn(R, H, generator=generator), valid, torch.tensor([0, 0, 0, 0, 1, 1, 1]), TOKENS


def reference(views, valid, sequences, pairs, negatives):
    rows = [t for t in range(R) if valid[:, t].all()]
    told_apart = {
        "batch": lambda t, u: True,
        "sequence": lambda t, u: sequences[u] == sequences[t],
        "other_tokens": lambda t, u: t == u or TOKENS[u] != TOKENS[t],
    }[negatives]
    losses = []
    for pair in pairs:
        for a, b in (pair, pair[::-1]):
            for t in rows:
                others = [u for u in rows if told_apart(t, u)]
                scores = torch.stack([cosine_similarity(views[a][t], views[b][u], dim=0) for u in others])
                losses.append(-(scores / CONFIG.temperature).log_softmax(0)[others.index(t)])
    return torch.stack(losses).mean()


PAIRS = {"consecutive": [(0, 1), (1, 2)], "all": [(0, 1), (0, 2), (1, 2)], "anchor": [(0, 1), (0, 2)]}


@pytest.mark.parametrize("negatives", ["batch", "sequence", "other_tokens"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_loss_equals_its_definition(pairs, negatives):
    """Stops: invalid rows among the negatives, a direction left out, the wrong pairs of steps."""
    drafts, features, valid, sequences, tokens = inputs()
    config = replace(CONFIG, pairs=pairs, negatives=negatives)
    loss = alignment_loss(drafts, features, valid, sequences, tokens, config)
    torch.testing.assert_close(loss, reference(drafts, valid, sequences, PAIRS[pairs], negatives))


@pytest.mark.parametrize("steps", [1, 2])
def test_the_target_can_be_a_view(steps):
    """Stops: the target's feature compared with nothing when there is one step, or taught."""
    drafts, features, valid, sequences, tokens = inputs()
    drafts, valid = drafts[:steps], valid[:steps]
    config = replace(CONFIG, target_view=True, pairs="anchor")
    loss = alignment_loss(drafts, features, valid, sequences, tokens, config)
    pairs = [(0, step + 1) for step in range(steps)]
    torch.testing.assert_close(loss, reference([features, *drafts], valid, sequences, pairs, "batch"))


def test_cosine_and_topology_equal_their_definitions():
    """Stops: a consistency that is not squared, a row among its neighbours, teacher and student swapped."""
    drafts, features, valid, sequences, tokens = inputs()
    rows = [t for t in range(R) if valid[:, t].all()]
    cosine = alignment_loss(drafts, features, valid, sequences, tokens, replace(CONFIG, kind="cosine"))
    far = [
        (1 - cosine_similarity(drafts[a, t], drafts[b, t], dim=0)) ** 2
        for a, b in PAIRS["consecutive"]
        for t in rows
    ]
    torch.testing.assert_close(cosine, torch.stack(far).mean())

    def neighbours(view, t):
        near = [cosine_similarity(view[t], view[u], dim=0) / CONFIG.temperature for u in rows if u != t]
        return torch.stack(near).softmax(0)

    topology = alignment_loss(drafts, features, valid, sequences, tokens, replace(CONFIG, kind="topology"))
    parts = []
    for view in drafts:
        for t in rows:
            p, q = neighbours(features, t), neighbours(view, t)
            parts.append((p * (p / q).log()).sum())
    torch.testing.assert_close(topology, torch.stack(parts).mean(), rtol=1e-4, atol=1e-5)


def test_loss_is_least_when_steps_agree():
    """Stops: a sign error, and positives that are not the same row."""
    drafts, features, valid, sequences, tokens = inputs()
    agreeing = drafts[:1].expand(S, -1, -1)
    losses = [
        alignment_loss(
            agreeing + noise * torch.randn(S, R, H), features, valid, sequences, tokens, CONFIG
        ).item()
        for noise in (0.0, 0.3, 3.0)
    ]
    moved = torch.stack([drafts[0], drafts[0].roll(1, 0), drafts[0].roll(2, 0)])
    assert all(a < b for a, b in pairwise(losses))
    assert losses[0] < alignment_loss(moved, features, valid, sequences, tokens, CONFIG)


def test_stop_gradient_teaches_the_later_step_only():
    """Stops: the better-informed early step being drawn towards the later one."""
    drafts, features, valid, sequences, tokens = inputs()
    config = replace(CONFIG, pairs="anchor", stop_gradient=True)
    alignment_loss(drafts, features, valid, sequences, tokens, config).backward()
    assert drafts.grad[0].abs().max() == 0
    assert drafts.grad[1].abs().max() > 0 and drafts.grad[2].abs().max() > 0
    assert drafts.grad[:, 3].abs().max() == 0  # the row that is not valid at every step


def test_rows_are_drawn_from_the_generator_alone():
    """Stops: a draw from the global generator, which would make a resumed run differ."""
    drafts, features, valid, sequences, tokens = inputs()
    few = replace(CONFIG, max_rows=3)

    def drawn(seed):
        torch.rand(1)
        draw = torch.Generator().manual_seed(seed)
        return alignment_loss(drafts, features, valid, sequences, tokens, few, draw).item()

    assert drawn(0) == drawn(0)
    assert len({drawn(seed) for seed in range(8)}) > 1


def test_one_row_has_nothing_to_be_told_from():
    """Stops: NaN from an empty mean."""
    drafts, features, valid, sequences, tokens = inputs()
    loss = alignment_loss(drafts[:, :1], features[:1], valid[:, :1], sequences[:1], tokens[:1], CONFIG)
    loss.backward()
    assert loss.item() == 0.0
