"""Products and attention of a few rows on the CPU, for compiled forwards: `few_rows.cpp`.

A verification multiplies some ten rows with every weight of the target. That should cost what one row costs,
since reading the weights takes longer than multiplying; libraries are made for one row or for hundreds. These
kernels read each weight once, in the order in which it lies in memory, and keep all rows' sums in registers.
Rows are float32 or bfloat16; all arithmetic is float32, so the processor need not know bfloat16. Weights that
bfloat16 can hold are stored in it, for float32 rows, too. `benchmarks/few_rows.py` compares with MKL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn.functional import pad

from coral.native.build import build
from coral.native.memory import weights_like

aten = torch.ops.aten

MOST_ROWS = 64
"""Above this, products are arithmetic, and libraries are better at it."""
DTYPES = torch.float32, torch.bfloat16
PANEL, _BLOCK, LANES = 16, 256, 16  # as in few_rows.h; lanes: the most there, of which sizes are multiples
_packed: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()


def load() -> bool:
    """Build the kernels, or find them built, and register them; see `cpp.build`."""
    if hasattr(torch.ops.coral, "linear"):
        return True
    if build(Path(__file__).with_suffix(".cpp")) is None:
        return False
    torch.library.register_fake("coral::linear", _linear_output)
    torch.library.register_fake("coral::attend", _attend_output)
    return True


def _linear_output(input: Tensor, packed: Tensor, bias: Tensor | None, width: int) -> Tensor:
    return input.new_empty(input.shape[0], width)


def _attend_output(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def pack(weight: Tensor) -> Tensor:
    """[N, K] -> flat: blocks of 256 inputs; in each the panels of 16 outputs; in each, input after input.

    Float32 weights that bfloat16 can hold, as those of most checkpoints, become bfloat16: the same numbers in
    half the bytes. Bfloat16 weights of two inputs stand together, in 32 bits.
    """
    narrow = weight.bfloat16()
    if torch.equal(narrow.to(weight.dtype), weight):
        weight = narrow
    together = 4 // weight.itemsize
    panels, inputs = -(-len(weight) // PANEL), weight.shape[1]
    padded = pad(weight, (0, -inputs % together, 0, panels * PANEL - len(weight)))
    packed = weights_like(padded).view(-1)
    for start in range(0, inputs, _BLOCK):
        block = padded[:, start : start + _BLOCK].reshape(panels, PANEL, -1, together).transpose(1, 2)
        packed.narrow(0, panels * PANEL * start, block.numel()).view(block.shape).copy_(block)
    return packed


def pack_once(weight: Tensor, met: Counter[Any]) -> Tensor:
    """`pack`, shared as in `once`."""
    contiguous = weight.contiguous()
    content = weight.shape, sha256(contiguous.view(torch.uint8).numpy().data).digest()
    return once(content, met, lambda: pack(contiguous))


def once(content: Hashable, met: Counter[Any], make: Callable[[], Tensor]) -> Tensor:
    """What `make` packs, shared by all graphs of this process that multiply with the same numbers.

    Args:
        content: what tells these numbers from others.
        met: weights of this graph so far. Those that are equal stay apart, as they are in the model: a
            deepened target is to cost what it weighs.
    """
    met[content] += 1
    key = content, met[content]
    packed = _packed.get(key)
    if packed is None:
        packed = _packed[key] = make()
    return packed


def can_attend(q: Tensor) -> bool:
    """Whether `attend` takes queries [B,H,N,d] here: only in a compiled forward, for which it was built."""
    return (
        torch.compiler.is_compiling()
        and hasattr(torch.ops.coral, "attend")
        and q.device.type == "cpu"
        and q.dtype in DTYPES
        and q.shape[2] <= MOST_ROWS
        and q.shape[3] % LANES == 0
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Grouped-query attention of q [B,H,N,d] over k, v [B,K,M,d] -> [B,N,H,d]; mask [B or 1,1,N,M] bool.

    All but the mask are of one dtype, float32 or bfloat16.
    A row that may attend to nothing becomes 0.
    """
    attended: Tensor = torch.ops.coral.attend(q, k, v, mask, scale)
    return attended


def use_in(graph: Graph) -> None:
    """A pass of inductor: products of few rows with a frozen weight [K, N] become torch.ops.coral.linear."""
    module = graph.owning_module
    assert module is not None
    met: Counter[Any] = Counter()
    for product in [aten.mm.default, aten.addmm.default]:
        for node in graph.find_nodes(op="call_function", target=product):
            *bias, rows, weight = node.args
            if not _fits(rows, weight, bias):
                continue
            name, width = f"{weight.target}_few_rows", weight.meta["val"].shape[1]
            if not hasattr(module, name):
                module.register_buffer(name, pack_once(getattr(module, weight.target).mT, met))
            with graph.inserting_before(node):
                packed = graph.get_attr(name)
                stored = getattr(module, name)
                packed.meta["val"] = weight.meta["val"].new_empty(stored.shape, dtype=stored.dtype)
                own = graph.call_function(
                    torch.ops.coral.linear.default, (rows, packed, bias[0] if bias else None, width)
                )
            own.meta = node.meta
            node.replace_all_uses_with(own)
            graph.erase_node(node)
            if not weight.users:  # a joined weight is in memory for this graph alone
                graph.erase_node(weight)


def _fits(rows: Any, weight: Any, bias: list[Any]) -> bool:
    value = rows.meta["val"]
    return (
        isinstance(weight, Node)
        and weight.op == "get_attr"
        and value.device.type == "cpu"
        and value.dtype in DTYPES
        and isinstance(value.shape[0], int)
        and value.shape[0] <= MOST_ROWS
        and all(offset.meta["val"].dim() == 1 for offset in bias)
    )
