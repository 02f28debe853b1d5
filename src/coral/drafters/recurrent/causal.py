"""Causal attention whose memory grows linearly with the length, and whose log-normaliser is an output.

Queries are taken a block of rows at a time, against only the columns that the block can see. Nothing of size
L x L is kept for the backward pass: it makes each block's scores again, and with the log-normaliser their
softmax is one exponential (flash attention, arXiv 2205.14135). Since the log-normaliser has a gradient too,
more keys can be merged into the same softmax afterwards, which is what the unroll does.

Shapes: B sequences, K key/value heads, G query heads for each, L rows, d head size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Rows of queries whose scores are in memory at a time."""


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, back: int = 0, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Row r attends to the columns starts[r] .. r - back; a row without any gets 0 and -inf.

    Args:
        q: scaled queries, [B,K,G,L,d].
        k, v: [B,K,L,d].
        starts: the first column of each row's document, int64 [B,L]; None when nothing is packed.

    Returns:
        What is attended, [B,K,G,L,d] in q's dtype, and the log of the sum of exponentials of each row's
        scores, [B,K,G,L], float32 for narrower types. Both are differentiable, once.
    """
    return _CausalAttention.apply(q, k, v, back, starts)


class _Block(NamedTuple):
    rows: slice
    columns: slice
    hidden: Tensor
    """bool [B or 1,1,1,rows,n]: which of the last n columns a row does not see."""


def _blocks(q: Tensor, back: int, starts: Tensor | None) -> Iterator[_Block]:
    length = q.shape[3]
    first = [0] * length if starts is None else starts.amin(0).tolist()  # per row, over the batch
    position = torch.arange(length, device=q.device)
    for top in range(back, length, BLOCK):
        end = min(top + BLOCK, length)
        columns = slice(min(first[top:end]), end - back)
        if columns.start >= columns.stop:
            continue
        rows = position[top:end, None]
        if starts is None:  # all rows of the block see the columns up to the first row's
            hidden = position[top - back : columns.stop] > rows - back
            yield _Block(slice(top, end), columns, hidden[None, None, None])
        else:
            column = position[columns]
            hidden = (column > rows - back) | (column < starts[:, top:end, None])
            yield _Block(slice(top, end), columns, hidden[:, None, None])


def _scores(q: Tensor, k: Tensor, block: _Block) -> Tensor:
    """The block's scores [B,K,G,rows,columns], -inf where they are hidden."""
    part = q[:, :, :, block.rows]
    scores = _times(part, k[:, :, block.columns].transpose(-1, -2))
    scores[..., -block.hidden.shape[-1] :].masked_fill_(block.hidden, float("-inf"))
    return scores


def _times(rows: Tensor, columns: Tensor) -> Tensor:
    """[B,K,G,n,x] @ [B,K,x,m] -> [B,K,G,n,m], summed and returned in float32 or wider."""
    product = torch.matmul(rows.flatten(2, 3), columns)
    return product.to(_wide(product.dtype)).unflatten(2, rows.shape[2:4])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, back: int, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        attended = torch.zeros_like(q, memory_format=torch.contiguous_format)
        log_sum = torch.full(q.shape[:-1], float("-inf"), dtype=_wide(q.dtype), device=q.device)
        keys, values = k.contiguous(), v.contiguous()
        with torch.autocast(q.device.type, enabled=False):
            for block in _blocks(q, back, starts):
                weights = _scores(q, keys, block)
                highest = weights.amax(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).min)
                total = weights.sub_(highest).exp_().sum(-1, keepdim=True)
                part = _times(weights.to(v.dtype), values[:, :, block.columns])
                attended[:, :, :, block.rows] = part / total.clamp(min=torch.finfo(total.dtype).tiny)
                log_sum[:, :, :, block.rows] = (highest + total.log()).squeeze(-1)
        ctx.save_for_backward(q, k, v, starts, attended, log_sum)
        ctx.back = back
        return attended, log_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_attended: Tensor, d_log_sum: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, attended, log_sum = ctx.saved_tensors
        k, v, wide = k.contiguous(), v.contiguous(), log_sum.dtype
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        # d score = weight * (d weight - change), d weight = d_attended . v
        change = (d_attended.to(wide) * attended).sum(-1) - d_log_sum  # [B,K,G,L]
        log_sum = log_sum.clamp(min=torch.finfo(wide).min)  # a row without columns: exp(-inf - lowest) = 0
        with torch.autocast(q.device.type, enabled=False):
            for block in _blocks(q, ctx.back, starts):
                rows, columns = block.rows, block.columns
                weights = _scores(q, k, block).sub_(log_sum[:, :, :, rows, None]).exp_()
                d_part = d_attended[:, :, :, rows]
                d_scores = _times(d_part, v[:, :, columns].transpose(-1, -2))
                d_scores.sub_(change[:, :, :, rows, None]).mul_(weights)
                dv[:, :, columns] += _transposed_times(weights.to(v.dtype), d_part)
                d_scores = d_scores.to(k.dtype)
                dk[:, :, columns] += _transposed_times(d_scores, q[:, :, :, rows])
                dq[:, :, :, rows] = _times(d_scores, k[:, :, columns])
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _transposed_times(a: Tensor, b: Tensor) -> Tensor:
    """[B,K,G,n,x], [B,K,G,n,m] -> [B,K,x,m], summed over G and n."""
    return torch.matmul(a.flatten(2, 3).transpose(-1, -2), b.flatten(2, 3))
