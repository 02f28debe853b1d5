"""Products and attention of few rows: the kernels against torch, and where compiled forwards use them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from coral import few_rows
from coral.compiled import compiled


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if not few_rows.load():
        pytest.skip("no vector unit that the compiler knows")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 600), st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
def test_products_are_those_of_torch_and_do_not_depend_on_the_other_rows(rows, inputs, width, biased, seed):
    """Stops a panel, a block of inputs or a tile of rows that is cut short or read twice; and sums that
    change with the number of rows, so that a verification would round otherwise than a plain step.
    """
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, inputs), torch.randn(width, inputs)
    bias = torch.randn(width) if biased else None
    product = torch.ops.coral.linear(x, few_rows.pack(weight), bias, width)
    torch.testing.assert_close(product, linear(x, weight, bias), rtol=1e-4, atol=1e-4 * inputs**0.5)
    alone = torch.ops.coral.linear(x[-1:], few_rows.pack(weight), bias, width)
    assert torch.equal(product[-1:], alone)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.integers(1, 12),
    st.integers(0, 40),
    st.sampled_from([16, 48, 64]),
    st.integers(0, 2**31),
)
def test_attention_is_that_of_torch(batch, heads, rows, past, size, seed):
    """Stops a query head on the wrong key head, a mask that is read for another row or sequence, keys behind
    the last one that is allowed, and a row that may attend to nothing and becomes NaN.
    """
    torch.manual_seed(seed)
    q = torch.randn(batch, rows, heads[0], size).transpose(1, 2)  # as a projection leaves it
    k, v = torch.randn(2, batch, heads[1], past + rows, size)
    mask = torch.rand(batch if seed % 2 else 1, 1, rows, past + rows) < 0.4
    attended = few_rows.attend(q, k, v, mask, size**-0.5)
    expected = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(attended, expected.nan_to_num(0), rtol=1e-4, atol=1e-5)


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
            torch.testing.assert_close(compiled(model.forward, x.device)(x), model(x), rtol=1e-5, atol=1e-5)
    assert [len(nodes) for nodes in products] == [3, 3, 3, 0]  # two of the four read the same rows
    assert [id(weight) for weight in packed[1]] == [id(weight) for weight in packed[2]]
    assert len({id(weight) for weight in packed[0] + packed[1]}) == 6
