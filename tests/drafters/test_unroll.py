"""The unroll must give the drafter what decoding gives it, at every step."""

from contextlib import contextmanager

import pytest
import torch
from tiny_training import tiny_drafter

from coral.drafters.recurrent import causal
from coral.drafters.recurrent.drafted import trained_rows
from coral.drafters.recurrent.unroll import offsets_in_document, unroll, unrolled_attention

B, L, STEPS = 2, 9, 4


class GrowingCache:
    """The plainest cache: concatenates. `keep` cuts it to the rows made from target features."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [GrowingLayer() for _ in range(num_layers)]

    def keep(self, rows: int) -> None:
        for layer in self.layers:
            layer.stored = [tensor[:, :, :rows] for tensor in layer.stored]


class GrowingLayer:
    def __init__(self) -> None:
        self.stored = []

    def update(self, key, value):
        if self.stored:
            key, value = torch.cat([self.stored[0], key], 2), torch.cat([self.stored[1], value], 2)
        self.stored = [key, value]
        return key, value


def random_inputs(width=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(B, L, width, generator=generator).to(dtype) for _ in range(2)]


def packed_starts():
    starts = torch.zeros(B, L, dtype=torch.bool)
    starts[0, [0, 4]] = True
    starts[1, [0, 2, 3, 7]] = True
    return starts


def propose_chains(drafter, embeddings, features, steps):
    """What decoding computes from every prefix: {(row, step): draft feature}, one document [n,h]."""
    drafted = {}
    cache = GrowingCache(len(drafter.layers))
    for last in range(len(features)):  # the last committed row: its feature is the target's
        cache.keep(last)
        fed = features[last]
        for step in range(1, steps + 1):
            row = last + step - 1
            if row == len(features):
                break
            position = torch.tensor([[row]])
            out = drafter(embeddings[None, None, row], fed[None, None], position, cache.layers)[0, 0]
            drafted[row, step] = out
            fed = drafter.feedback(out)
    return drafted


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"normalised_feedback": True}])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_unroll_is_what_a_real_decode_computes(options, packed):
    """Stops: a diagonal one column off, a key too many, a shift across documents, a wrong position."""
    drafter = tiny_drafter(**options).double()
    embeddings, features = random_inputs()
    starts = packed_starts() if packed else None
    outputs = unroll(drafter, embeddings, features, starts, STEPS)
    compared = 0
    for sequence in range(B):
        edges = starts[sequence].nonzero().squeeze(1).tolist() if packed else [0]
        for first, end in zip(edges, [*edges[1:], L], strict=True):
            document = slice(first, end)
            chains = propose_chains(
                drafter, embeddings[sequence, document], features[sequence, document], STEPS
            )
            for (row, step), expected in chains.items():
                torch.testing.assert_close(
                    outputs[step - 1][sequence, first + row], expected, rtol=1e-10, atol=1e-10
                )
                compared += 1
    assert compared > 4 * L


def dense_attention(q, keys, values, offsets):
    """The definition, cell by cell."""
    batch, heads, length, width = q.shape
    group, steps = heads // keys[0].shape[1], len(keys)
    out = torch.zeros(batch, length, heads, width, dtype=q.dtype)
    for b in range(batch):
        for head in range(heads):
            for row in range(length):
                offset = int(offsets[b, row])
                seen = [(0, column) for column in range(row - offset, row - steps + 2)]
                seen += [(j, row - steps + 1 + j) for j in range(1, steps) if offset >= steps - 1 - j]
                k = torch.stack([keys[j][b, head // group, column] for j, column in seen])
                v = torch.stack([values[j][b, head // group, column] for j, column in seen])
                out[b, row, head] = torch.softmax(k @ q[b, head, row] / width**0.5, 0) @ v
    return out.flatten(2)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_fast_attention_equals_its_definition(steps):
    """Stops: masked columns leaking into the softmax (the public HASS code), heads grouped the wrong way
    round.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, 4, L, 6, generator=generator).double()
    keys, values = (
        [torch.randn(B, 2, L, 6, generator=generator).double() for _ in range(steps)] for _ in "kv"
    )
    for starts in (None, packed_starts()):
        offsets = offsets_in_document(starts, torch.Size([B, L]))
        fast = unrolled_attention(q, keys, values, None if starts is None else offsets)
        torch.testing.assert_close(fast, dense_attention(q, keys, values, offsets))


def simple_attention(q, keys, values, offsets):
    """The slow twin: all scores of all rows at once, one softmax, autograd."""
    group, length, steps = q.shape[1] // keys[0].shape[1], q.shape[2], len(keys)
    keys, values = ([x.repeat_interleave(group, 1) for x in given] for given in (keys, values))  # [B,H,L,d]
    row = torch.arange(length)
    parts = [(0, (row <= row[:, None] - (steps - 1)) & (row >= (row - offsets)[..., None]))]
    parts += [(j, (row == row[:, None] - (steps - 1 - j)) & (offsets >= steps - 1 - j)[..., None])
              for j in range(1, steps)]  # fmt: skip
    seen = torch.cat([mask.expand(len(q), -1, -1) for _, mask in parts], -1).unsqueeze(1)  # [B,1,L,S*L]
    scores = q @ torch.cat(keys, 2).transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ torch.cat(values, 2)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", [1, 4, 128])
def test_blocks_equal_all_rows_at_once(monkeypatch, steps, packed, block):
    """Stops: a block edge one row off, an uneven last block, a document that starts inside one or in its last
    rows, a hand-written gradient that is wrong (that of the log-normaliser is used from step 2 on).
    """
    monkeypatch.setattr(causal, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    length, starts = 13, torch.zeros(B, 13, dtype=torch.bool)
    starts[0, [0, 3, 6, 12]] = starts[1, [0, 6, 8, 12]] = True
    draw = [torch.randn(B, length, heads, 6, generator=generator) for heads in [4] + [2] * 2 * steps]
    q, *rest = inputs = [x.double().transpose(1, 2).requires_grad_() for x in draw]
    keys, values = rest[:steps], rest[steps:]
    offsets = offsets_in_document(starts if packed else None, torch.Size([B, length]))
    fast = unrolled_attention(q, keys, values, offsets if packed else None)
    slow = simple_attention(q, keys, values, offsets)
    torch.testing.assert_close(fast, slow)
    upstream = torch.randn(fast.shape, generator=generator).double()
    expected = torch.autograd.grad(slow, inputs, upstream)
    for gradient, wanted in zip(torch.autograd.grad(fast, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@contextmanager
def kept_numbers():
    """The sizes of the tensors that autograd keeps for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        yield saved


def test_nothing_of_length_times_length_is_kept():
    """Stops: memory that grows with the square of the length, through a tensor kept for the backward pass."""
    sizes = {}
    for length in (256, 512):
        q, k, v = (torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3))
        with kept_numbers() as saved:
            unrolled_attention(q, [k, k, k], [v, v, v])
        sizes[length] = sum(saved)
    assert sizes[512] <= 2 * sizes[256]


def test_attention_in_bfloat16_is_close_to_float32():
    """Stops: scores, sums or gradients gathered over many blocks in half precision."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, heads, 300, 8, generator=generator) for heads in (4, 2, 2, 2, 2)]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        q, *rest = inputs = [x.bfloat16().to(dtype).requires_grad_() for x in exact]
        with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
            out = unrolled_attention(q, rest[:2], rest[2:])
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for wide, narrow in zip(*results, strict=True):
        assert (wide - narrow).norm() < 0.02 * wide.norm()


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_checkpointed_steps_have_the_same_gradients(detach, packed):
    """Stops: keys of earlier steps cut off from their gradient, or computed again from later inputs."""
    results = []
    for checkpoint_steps in (False, True):
        drafter = tiny_drafter(num_layers=2).double()
        embeddings, features = random_inputs()
        features.requires_grad_()
        with kept_numbers() as saved:
            outputs = unroll(
                drafter,
                embeddings,
                features,
                packed_starts() if packed else None,
                STEPS,
                detach,
                checkpoint_steps,
            )
        sum((out * (s + 1)).square().sum() for s, out in enumerate(outputs)).backward()
        gradients = [features.grad, *(parameter.grad for parameter in drafter.parameters())]
        results.append((outputs, gradients, sum(saved)))
    (outputs, gradients, kept), (again, same, kept_again) = results
    assert all(map(torch.equal, outputs, again))
    for gradient, wanted in zip(same, gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    assert kept_again < kept / 10  # what the forward pass keeps


@torch.no_grad()
def test_no_step_sees_the_future():
    """Stops: a causal mask one column too wide; a change at row t must leave all rows before t alone."""
    drafter = tiny_drafter().double()
    embeddings, features = random_inputs()
    before = unroll(drafter, embeddings, features, None, STEPS)
    t = 5
    embeddings[:, t] += 1.0
    features[:, t] += 1.0
    after = unroll(drafter, embeddings, features, None, STEPS)
    for step in range(STEPS):
        assert torch.equal(before[step][:, :t], after[step][:, :t])
        assert not torch.isclose(before[step][:, t], after[step][:, t]).any()


@torch.no_grad()
def test_documents_do_not_see_each_other():
    """Stops: attention, shifts or positions that run on into the next packed document."""
    drafter = tiny_drafter().double()
    embeddings, features = random_inputs()
    before = unroll(drafter, embeddings, features, packed_starts(), STEPS)
    features[0, :4] += 1.0
    embeddings[0, :4] += 1.0
    after = unroll(drafter, embeddings, features, packed_starts(), STEPS)
    for step in range(STEPS):
        assert torch.equal(before[step][0, 4:], after[step][0, 4:])


def test_detached_steps_pass_no_gradient_to_the_step_before():
    """Stops: the chain being differentiated although the recipe says it is not, and the other way round."""
    drafter = tiny_drafter().double()
    embeddings, features = random_inputs()
    for detach in (True, False):
        first, second = unroll(drafter, embeddings, features, None, 2, detach)
        (gradient,) = torch.autograd.grad(second.sum(), first, allow_unused=True)
        assert (gradient is None) == detach


def test_trained_rows_predict_tokens_the_target_writes():
    """Stops: the unshifted mask of other trainers, which never trains the first row of an answer."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    assert trained_rows(mask, None, 1)[0, 0].nonzero().squeeze(1).tolist() == [1, 2, 3, 6, 7]
    starts = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    rows = trained_rows(mask, starts, 3)[:, 0]
    assert rows[0].nonzero().squeeze(1).tolist() == [1, 6, 7]  # tokens 4 and 5 are the document's first two
    assert rows[2].nonzero().squeeze(1).tolist() == [6, 7]
