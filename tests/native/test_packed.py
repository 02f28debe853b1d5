"""Packed linear layers against `nn.Linear`, their slow twin."""

import copy

import pytest
import torch
from torch import nn

from coral.drafters.heads.routed import group_logits
from coral.native.packed import MOST_ROWS, PackedGroups, PackedLinear, pack_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")


@pytest.mark.parametrize("shape", [(300, 64), (64, 300), (33, 17), (1, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_equals_plain_for_any_number_of_rows_and_threads(shape, bias):
    """Stops: a weight packed for one number of rows or threads and multiplied wrongly with another."""
    outputs, inputs = shape
    plain = nn.Linear(inputs, outputs, bias=bias)
    packed = copy.deepcopy(plain)
    assert pack_linears(packed) and type(packed) is PackedLinear
    threads = torch.get_num_threads()
    try:
        with torch.inference_mode():
            for count in (1, 2, threads):
                torch.set_num_threads(count)
                for rows in (0, 1, 2, 7, 16, 17, MOST_ROWS, MOST_ROWS + 1):
                    x = torch.randn(1, rows, inputs)
                    assert torch.allclose(packed(x), plain(x), atol=1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_groups_are_those_that_were_named(dtype, biased):
    """Stops: the product of another group, or of one group with another's bias."""
    weight = torch.randn(5, 33, 17, dtype=dtype)
    bias = torch.randn(5, 33, dtype=dtype) if biased else None
    groups, chosen = PackedGroups(weight, bias), torch.tensor([3, 0, 4])
    assert (groups.packed is not None) == (dtype == torch.float32)
    with torch.inference_mode():
        for rows in (0, 1, 4, MOST_ROWS + 1):
            x = torch.randn(rows, 17, dtype=dtype)
            expected = group_logits(weight, bias, x, chosen)
            close = 1e-5 if dtype == torch.float32 else 0.1
            assert torch.allclose(groups(x, chosen).float(), expected, atol=close)


def test_a_changed_weight_is_packed_anew_and_gradients_flow():
    """Stops: acceptance measured with the drafter's weights of an earlier update, and lost gradients."""
    layer = nn.Linear(8, 8)
    pack_linears(layer)
    x = torch.randn(3, 8)
    with torch.no_grad():
        layer(x)
        layer.weight.add_(1.0)
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    again = copy.deepcopy(layer)
    with torch.no_grad():
        assert torch.allclose(again(x), layer(x), atol=1e-5)


def test_what_cannot_be_packed_is_left_alone(monkeypatch):
    """Stops: bfloat16 weights handed to a float32 kernel, and a copy that does not fit in memory."""
    half = nn.Linear(4, 4, dtype=torch.bfloat16)
    assert not pack_linears(half) and type(half) is nn.Linear
    monkeypatch.setattr("coral.native.packed.psutil.virtual_memory", lambda: type("M", (), {"available": 0}))
    assert not pack_linears(nn.Linear(4, 4))
