"""Products and attention of few rows: the kernels against torch, and where compiled forwards use them."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import prompt_of, tiny_model
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from coral.decoding.state import State
from coral.gpu.compiled import compiled
from coral.native import few_rows
from coral.native.memory import weights_like
from coral.target.grouped_sdpa import GROUPED_SDPA
from coral.target.target import Target
from coral.tree import DraftTree


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not few_rows.load():
        pytest.skip("no vector unit that the compiler knows")


DTYPES = st.sampled_from(few_rows.DTYPES)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 600),
    st.integers(1, 70),
    st.booleans(),
    DTYPES,
    DTYPES,
    st.integers(0, 2**31),
)
def test_products_are_those_of_torch_and_do_not_depend_on_the_other_rows(
    rows, inputs, width, biased, row_dtype, weight_dtype, seed
):
    """Stops a panel, a block of inputs or a tile of rows that is cut short or read twice; sums that change
    with the number of rows, so that a verification would round otherwise than a plain step; and bfloat16
    sums that are rounded on the way.
    """
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, inputs).to(row_dtype), torch.randn(width, inputs).to(weight_dtype)
    bias = torch.randn(width).to(row_dtype) if biased else None
    packed, wide_bias = few_rows.pack(weight), bias.float() if biased else None
    exact = torch.ops.coral.linear(x.float(), packed, wide_bias, width)
    expected = linear(x.float(), weight.float(), wide_bias)
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4 * inputs**0.5)
    product = torch.ops.coral.linear(x, packed, bias, width)
    assert torch.equal(product, exact.to(row_dtype))
    assert torch.equal(product[-1:], torch.ops.coral.linear(x[-1:], packed, bias, width))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 600), st.integers(1, 70), st.integers(0, 2**31))
def test_weights_that_bfloat16_can_hold_take_half_and_multiply_the_same(rows, inputs, width, seed):
    """Stops a packing that rounds weights, or keeps four bytes for each of a bfloat16 checkpoint."""
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, inputs), torch.randn(width, inputs)
    assert few_rows.pack(weight).dtype == torch.float32
    held = weight.bfloat16().float()
    packed = few_rows.pack(held)
    one_off = torch.cat([held, weight[:1]])  # one row more that it cannot hold
    assert packed.dtype == torch.bfloat16
    wide = torch.ops.coral.linear(x, few_rows.pack(one_off), None, width + 1)
    assert torch.equal(torch.ops.coral.linear(x, packed, None, width), wide[:, :width])


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 2),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.integers(1, 12),
    st.integers(0, 40),
    st.sampled_from([16, 48, 64]),
    DTYPES,
    st.integers(0, 2**31),
)
def test_attention_is_that_of_torch(batch, heads, rows, past, size, dtype, seed):
    """Stops a query head on the wrong key head, a mask that is read for another row or sequence, keys behind
    the last one that is allowed, a row that may attend to nothing and becomes NaN, and a row that depends on
    those beside it.
    """
    torch.manual_seed(seed)
    q = torch.randn(batch, rows, heads[0], size).to(dtype).transpose(1, 2)  # as a projection leaves it
    k, v = torch.randn(2, batch, heads[1], past + rows, size).to(dtype)
    mask = torch.rand(batch if seed % 2 else 1, 1, rows, past + rows) < 0.4
    wide = q.float(), k.float(), v.float()
    exact = few_rows.attend(*wide, mask, size**-0.5)
    expected = scaled_dot_product_attention(*wide, mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(exact, expected.nan_to_num(0), rtol=1e-4, atol=1e-5)
    attended = few_rows.attend(q, k, v, mask, size**-0.5)
    assert torch.equal(attended, exact.to(dtype))
    alone = few_rows.attend(q[:, :, -1:], k, v, mask[:, :, -1:], size**-0.5)
    assert torch.equal(attended[:, -1:], alone)


class Two(nn.Module):
    """Products as a decoder has them: two that read the same rows, and one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 32, bias=False), nn.Linear(48, 32, bias=False)
        self.biased, self.again = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.biased(self.first(x).relu() * self.second(x)).relu())


def test_compiled_products_of_few_rows_are_ours(monkeypatch):
    """Stops a torch release whose graphs the pass no longer recognises, which would only be slow; a compiled
    graph that is found again for another model of the same shape, with the first one's weights; a copy of
    the weights for each number of rows; and equal weights that become one, so that a deepened target costs
    less than it weighs.
    """
    products, packed = [], []

    def watch(graph):
        use_in(graph)
        products.append(graph.find_nodes(op="call_function", target=torch.ops.coral.linear.default))
        packed.append([getattr(graph.owning_module, node.args[1].target) for node in products[-1]])

    use_in = few_rows.use_in
    monkeypatch.setattr(few_rows, "use_in", watch)
    one, other = Two().requires_grad_(False).eval(), Two().requires_grad_(False).eval()
    other.again.load_state_dict(other.biased.state_dict())
    for model, rows in ((one, 3), (other, 3), (other, 5), (one, few_rows.MOST_ROWS + 1)):
        x = torch.randn(rows, 48)
        with torch.inference_mode():
            torch.testing.assert_close(
                compiled(model.forward, x.device, 1)(x), model(x), rtol=1e-5, atol=1e-5
            )
    assert [len(nodes) for nodes in products] == [3, 3, 3, 0]  # two of the four read the same rows
    assert [id(weight) for weight in packed[1]] == [id(weight) for weight in packed[2]]
    assert len({id(weight) for weight in packed[0] + packed[1]}) == 6


def test_a_verification_in_bfloat16_is_plain_steps_bit_for_bit(monkeypatch):
    """Stops a bfloat16 model that is left to torch, and rows that are rounded otherwise beside others, so
    that ties fall otherwise than in plain decoding. Four layers: only then operations were fused differently
    for one row and for eight.
    """
    calls = []

    def watch(graph):
        use_in(graph)
        for kernel in (torch.ops.coral.linear.default, torch.ops.coral.attend.default):
            calls.append(len(graph.find_nodes(op="call_function", target=kernel)))

    use_in = few_rows.use_in
    monkeypatch.setattr(few_rows, "use_in", watch)
    model = tiny_model(
        "llama", GROUPED_SDPA, hidden_size=64, intermediate_size=112, head_dim=16, num_hidden_layers=4
    )
    target = Target(model.to(torch.bfloat16)).on("graphs", (1, 8))
    prompt, tokens = prompt_of(9), torch.tensor(prompt_of(7))
    state = State(prompt, 40, target.new_cache(64))
    state.prefill(target, (-1,))

    def verify(tokens):
        chain = DraftTree(tokens, torch.arange(-1, len(tokens) - 1), torch.zeros(len(tokens)))
        (logits,), (features,) = target.verify([state.cache], [chain])
        return logits, features

    together = verify(tokens)
    state.cache.keep(len(prompt) - 1)
    alone = [verify(token[None]) for token in tokens]
    for rows, steps in zip(together, zip(*alone, strict=True), strict=True):
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows, torch.cat(steps))
    assert calls == [17, 4, 17, 4]  # products and attentions of each size


def test_weights_in_shared_memory_lie_apart():
    """Stops weights that overwrite each other, where small ones share a piece of memory."""
    shapes = [(3, 5), (1,), (700, 33), (0, 4), (17_000, 1024), (2, 2)]
    made = [
        weights_like(torch.empty(shape, dtype=dtype)).fill_(index)
        for index, (shape, dtype) in enumerate(product(shapes, few_rows.DTYPES))
    ]
    for index, weights in enumerate(made):
        assert weights.shape == shapes[index // 2] and weights.is_contiguous()
        assert (weights == index).all() and weights.data_ptr() % 16 == 0
