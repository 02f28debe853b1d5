"""Attention with grouped key/value heads, three ways that must agree."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from coral.target.attention import _fold, attend

SIZES = {
    "batch": st.integers(1, 3),
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 4),
    "rows": st.integers(1, 6),
    "keys": st.integers(6, 20),
    "width": st.sampled_from([1, 4, 8]),
    "scale": st.sampled_from([None, 0.3]),
    "seed": st.integers(0, 99),
}


def random_input(batch, kv_heads, group, rows, keys, width, seed):
    """q as a projection leaves it, k and v as a cache with free room returns them; no row sees nothing."""
    torch.manual_seed(seed)
    q = torch.randn(batch, rows, kv_heads * group, width, dtype=torch.float64).transpose(1, 2)
    k, v = torch.randn(2, batch, kv_heads, keys + 3, width, dtype=torch.float64)[:, :, :, :keys]
    mask = torch.rand(batch, 1, rows, keys) < 0.7
    mask[..., 0] = True
    return q, k, v, mask


def repeated(q, k, v, mask, scale):
    """The slow twin: a key/value head for each query head."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


@given(masked=st.booleans(), **SIZES)
def test_folded_grouped_and_repeated_heads_agree(masked, scale, **sizes):
    """Stops a query head that meets another group's keys, or another row's mask."""
    q, k, v, mask = random_input(**sizes)
    given_mask = mask if masked else None
    expected = repeated(q, k, v, given_mask, scale)
    grouped = scaled_dot_product_attention(q, k, v, attn_mask=given_mask, scale=scale, enable_gqa=True)
    torch.testing.assert_close(_fold(q, k, v, given_mask, scale), expected)
    torch.testing.assert_close(grouped.transpose(1, 2), expected)
    if masked:
        torch.testing.assert_close(attend(q, k, v, mask, scale), expected)


@given(**SIZES)
def test_without_a_mask_rows_are_the_last_of_a_causal_sequence(scale, **sizes):
    """Stops rows that look ahead, or that are taken as the first ones where keys came before them."""
    q, all_k, all_v, _ = random_input(**sizes)
    for keys in (q.shape[2], all_k.shape[2]):
        k, v = all_k[:, :, :keys], all_v[:, :, :keys]
        causal = torch.ones(q.shape[2], keys, dtype=torch.bool).tril(keys - q.shape[2])
        expected = repeated(q, k, v, causal[None, None], scale)
        torch.testing.assert_close(attend(q, k, v, None, scale), expected)
        for mask in (causal, causal.expand(len(q), -1, -1), causal.expand(len(q), 1, -1, -1)):
            torch.testing.assert_close(attend(q, k, v, mask, scale), expected)


@pytest.mark.parametrize("rows", [1, 5])
def test_on_other_devices_heads_are_folded_under_a_mask(rows, monkeypatch):
    """Stops the repetition of key/value heads on a GPU, which reads them once a query head."""
    seen = []

    def watch(q, k, v, attn_mask=None, enable_gqa=False, **kwargs):
        seen.append((tuple(q.shape), tuple(attn_mask.shape), enable_gqa))
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr("coral.target.attention.scaled_dot_product_attention", watch)
    q, k, v, mask = (x.to("meta") for x in random_input(2, 3, 4, rows, 9, 8, 0))
    assert attend(q, k, v, mask).shape == (2, rows, 12, 8)
    mask_rows = 1 if rows == 1 else 4 * rows
    assert seen == [((2, 3, 4 * rows, 8), (2, 1, mask_rows, 9), False)]
