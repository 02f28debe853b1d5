"""Weights in native panels: what torch packs, shared only by equal ones."""

from __future__ import annotations

from collections import Counter
from ctypes import CDLL, byref, c_int64, c_void_p

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, pad

from coral.native import packing
from coral.target import native as forward


@pytest.fixture(scope="module")
def library() -> CDLL:
    built = forward._library()
    if built is None:
        pytest.skip("no C++ compiler for this processor")
    return built


def slow_pack(weight: Tensor) -> Tensor:
    """[N, K] -> flat, as `packing` says, with torch alone."""
    narrow = weight.bfloat16()
    weight = narrow if torch.equal(narrow.to(weight.dtype), weight) else weight
    together, panels = 4 // weight.itemsize, -(-len(weight) // 16)
    padded = pad(weight, (0, 0, 0, panels * 16 - len(weight)))
    blocks = [
        block.reshape(panels, 16, -1, together).transpose(1, 2).flatten() for block in padded.split(256, 1)
    ]
    return torch.cat(blocks)


def product(library: CDLL, weight: Tensor, x: Tensor, threads: int = 1, unit: int = 0) -> Tensor:
    panels = packing.pack(library, [weight])
    narrow = int(panels.dtype == torch.bfloat16)
    matrix = forward._Matrix(panels.data_ptr(), None, x.shape[1], len(weight), narrow)
    sums = torch.full((len(x), len(weight)), torch.nan)
    pointers, sizes = (c_void_p(x.data_ptr()), c_void_p(sums.data_ptr())), (c_int64(len(x)), c_int64(threads))
    library.coral_multiply(byref(matrix), pointers[0], sizes[0], c_int64(unit), sizes[1], pointers[1])
    return sums


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 70),
    st.sampled_from(packing.DTYPES),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_products_are_those_of_torch_and_do_not_depend_on_the_other_rows(
    library, rows, half, width, dtype, threads, seed
) -> None:
    """Stops a panel, a block of inputs or a tile of rows that is cut short or read twice, and sums that
    change with the number of rows, so that a verification would round otherwise than a plain step.
    """
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, 2 * half), torch.randn(width, 2 * half).to(dtype)
    own = product(library, weight, x, threads)
    torch.testing.assert_close(own, linear(x, weight.float()), rtol=1e-4, atol=1e-4 * (2 * half) ** 0.5)
    assert torch.equal(own[-1:], product(library, weight, x[-1:].contiguous()))
    x = x.bfloat16().float()  # then numbers may be multiplied in pairs
    unit = min(forward._unit(), 1)
    own = product(library, weight, x, threads, unit)
    torch.testing.assert_close(own, linear(x, weight.float()), rtol=1e-4, atol=1e-4 * (2 * half) ** 0.5)
    assert torch.equal(own[-1:], product(library, weight, x[-1:].contiguous(), unit=unit))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**31))
def test_weights_that_bfloat16_can_hold_multiply_the_same(library, rows, half, width, seed) -> None:
    """Stops a packing that rounds weights."""
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, 2 * half), torch.randn(width, 2 * half)
    held = weight.bfloat16().float()
    one_off = torch.cat([held, weight[:1] + 2**-20])  # one row more that it cannot hold
    assert torch.equal(product(library, held, x), product(library, one_off, x)[:, :width])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=3),
    st.integers(1, 270),
    st.booleans(),
    st.sampled_from(["bfloat16", "float32", "held"]),
    st.integers(0, 2**31),
)
def test_panels_are_those_of_torch(library, rows, half, interleaved, kind, seed) -> None:
    """Stops a row or an input that lands elsewhere, one of the padding that is not zero, and float32 weights
    that are rounded although bfloat16 cannot hold them, or kept wide although it can.
    """
    torch.manual_seed(seed)
    rows = [16 * rows[0]] * len(rows) if interleaved else rows
    weights = [torch.randn(each, 2 * half) for each in rows]
    if kind != "float32":
        weights = [each.bfloat16() if kind == "bfloat16" else each.bfloat16().float() for each in weights]
    joined = torch.cat(weights)
    if interleaved:
        joined = torch.stack([each.unflatten(0, (-1, 16)) for each in weights], 1).flatten(0, 2)
    packed = packing.pack(library, weights, interleaved)
    assert packed.dtype == (torch.float32 if kind == "float32" else torch.bfloat16)
    assert torch.equal(packed, slow_pack(joined))


def test_equal_weights_share_their_panels_and_others_do_not(library) -> None:
    """Stops a copy for every target of one model, and a target that multiplies with another one's weights:
    of other numbers, of another shape, or changed in place since.
    """
    weight = torch.randn(64, 64).bfloat16()
    first = packing.pack_once(library, [weight], False, Counter())
    assert packing.pack_once(library, [weight.clone()], False, Counter()) is first
    met = Counter()
    apart = [packing.pack_once(library, [weight], False, met) for _ in range(2)]
    assert apart[0] is first and apart[1] is not first
    assert packing.pack_once(library, [weight[:32], weight[32:]], True, Counter()) is not first
    assert packing.pack_once(library, [weight.view(32, 128)], False, Counter()) is not first
    weight.data[63, 63] += 1  # which no version counter sees
    changed = packing.pack_once(library, [weight], False, Counter())
    assert changed is not first and not torch.equal(changed, first)


@given(st.integers(1, 5000), st.data())
def test_a_digest_depends_on_every_bit(library, words, data) -> None:
    """Stops a piece, or a word at its end, that is not looked at, and words that may change places."""
    weight = torch.randint(-(2**62), 2**62, (words,), generator=torch.Generator().manual_seed(words))
    before = packing.digest(library, weight)
    assert packing.digest(library, weight.clone()) == before
    index, bit = data.draw(st.integers(0, words - 1)), data.draw(st.integers(0, 62))
    other = weight.clone()
    other[index] ^= 1 << bit
    assert packing.digest(library, other) != before
    assert words == 1 or packing.digest(library, weight.roll(1)) != before
