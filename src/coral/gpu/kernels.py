"""The routed head's product on a GPU: some rows with a few groups of a weight, none of it copied.

The groups are read where they lie, by their numbers on the device, so the host neither waits for the router's
choice nor launches a product for each group. Needs triton; without it `group_logits` is its PyTorch twin.
Import it late: triton takes half a second.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

MOST_ROWS = 64  # of one program; above this the weight is read again


def group_logits_slowly(weight: Tensor, bias: Tensor | None, features: Tensor, chosen: Tensor) -> Tensor:
    """The twin of `group_logits`: gathers the groups, then multiplies."""
    logits = torch.einsum("nh,arh->nar", features.float(), weight[chosen].float())
    return (logits if bias is None else logits + bias[chosen]).flatten(1)


def group_logits(weight: Tensor, bias: Tensor | None, features: Tensor, chosen: Tensor) -> Tensor:
    """Products of features [N, h] with the A chosen of G groups of R rows.

    Args:
        weight: [G, R, h] float32, bfloat16 or float16, contiguous. bias: [G, R] contiguous, or None.
        features: in the weight's dtype. chosen: [A] int64, on the device.

    Returns:
        [N, A * R] float32: features[n] . weight[chosen[a], r] + bias[chosen[a], r] at [n, a * R + r], summed
        in float32 and, for float32 weights, without TensorFloat-32.
    """
    if triton is None:
        return group_logits_slowly(weight, bias, features, chosen)
    features = features.to(weight.dtype).contiguous()
    (count, width), size, active = features.shape, weight.shape[1], len(chosen)
    logits = torch.empty(count, active * size, dtype=torch.float32, device=weight.device)
    if logits.numel() == 0:
        return logits
    block = blocks(count, weight.element_size())
    grid = (triton.cdiv(size, block["BLOCK_IDS"]), active, triton.cdiv(count, block["BLOCK_ROWS"]))
    with torch.cuda.device_of(weight):  # triton launches on the current device
        _group_logits[grid](
            weight,
            weight if bias is None else bias,
            features,
            chosen,
            logits,
            count,
            size,
            width,
            active,
            HAS_BIAS=bias is not None,
            **block,
            num_warps=4,
            num_stages=4,
            enable_fp_fusion=True,
        )
    return logits


def blocks(count: int, element_size: int) -> dict[str, int]:
    """What one program multiplies: blocks that leave room for four loads in flight (48 to 128 KiB)."""
    rows = min(MOST_ROWS, max(16, 1 << (count - 1).bit_length()))  # 16 is the least of a tensor core
    ids, width = (64, 128) if element_size == 2 else (32, 64)
    return {"BLOCK_ROWS": rows, "BLOCK_IDS": ids, "BLOCK_WIDTH": width}


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _group_logits(  # type: ignore[no-untyped-def]  # triton would run the annotations
        weight, bias, features, chosen, logits, count, size, width, active,
        HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IDS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One block of ids of one group, for one block of rows.

        The weight is the left factor: its rows fill a tensor core's tile, whose other side may be as narrow
        as the few nodes of a level.
        """
        place = tl.program_id(1)
        group = tl.load(chosen + place)  # int64, so that offsets into a large weight are too
        ids = tl.program_id(0) * BLOCK_IDS + tl.arange(0, BLOCK_IDS)
        rows = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        columns = tl.arange(0, BLOCK_WIDTH)
        there, asked = ids < size, rows < count
        left = weight + (group * size + ids)[:, None] * width + columns[None, :]
        right = features + rows[None, :] * width + columns[:, None]
        total = tl.zeros((BLOCK_IDS, BLOCK_ROWS), dtype=tl.float32)
        for begin in range(0, width, BLOCK_WIDTH):
            inside = columns < width - begin
            a = tl.load(left + begin, mask=there[:, None] & inside[None, :], other=0.0)
            b = tl.load(right + begin, mask=inside[:, None] & asked[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias + group * size + ids, mask=there, other=0.0).to(tl.float32)[:, None]
        out = logits + rows[None, :] * (active * size) + place * size + ids[:, None]
        tl.store(out, total, mask=there[:, None] & asked[None, :])
