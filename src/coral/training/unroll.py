"""The unroll: run a drafter for S draft steps on a batch, each with the inputs that decoding would give it.

The frame is fixed (HASS, arXiv 2408.15766): at every step, row r predicts the feature of token r+1. Step 1
reads the target's features. Step s reads the drafter's own outputs of step s-1, moved one row on, because a
drafter that has made s-1 tokens stands s-1 rows behind the last row that the target has checked. So at step s
row r attends to

    the keys of step 1 at columns <= r - (s-1)        what the target has checked, and
    the key of step j at column r - (s-j), 2 <= j <= s   one row for each draft step since, its own included,

all of them in one softmax and in the same document. This is the key/value state of decoding after s-1 draft
steps. (The published HASS code lets masked columns into the normaliser; this does not.)

Shapes: B sequences, L rows, S steps, h hidden size, H heads, K key/value heads, G = H/K, d head size.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from coral.drafter.drafter import Drafter, DraftLayer


def offsets_in_document(document_starts: Tensor | None, shape: torch.Size) -> Tensor:
    """Each row's distance from the start of its document, int64 [B,L]; without starts a sequence is one
    document.
    """
    columns = torch.arange(shape[1], device=None if document_starts is None else document_starts.device)
    if document_starts is None:
        return columns.expand(shape[0], -1)
    return columns - torch.where(document_starts, columns, 0).cummax(dim=1).values


def unroll(
    drafter: Drafter,
    embeddings: Tensor,
    features: Tensor,
    document_starts: Tensor | None,
    steps: int,
    detach: bool = True,
) -> list[Tensor]:
    """Draft features [B,L,h] of every step: row r of step s predicts the feature of token r+1.

    Args:
        embeddings: the embedding of token r+1 at row r, [B,L,h].
        features: the target's feature of token r at row r, [B,L,h].
        document_starts: bool [B,L], True where a packed document starts; None when nothing is packed.
        detach: stop gradients between a step's output and the next step's input (HASS does).

    Rows that lie less than s-1 rows into their document stand for no state of decoding at step s: their
    values are finite and without meaning, and no loss may read them.
    """
    offsets = offsets_in_document(document_starts, features.shape[:2]).to(features.device)  # [B,L]
    visible = offsets if document_starts is not None else None
    cos = sin = None
    kept: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in drafter.layers]
    outputs: list[Tensor] = []
    for _ in range(steps):
        if outputs:
            drafted = drafter.feedback(outputs[-1].detach() if detach else outputs[-1])
            moved = pad(drafted, (0, 0, 1, 0))[:, :-1].to(features.dtype)  # row r reads row r-1
            fed = torch.where((offsets == 0).unsqueeze(-1), features, moved)  # [B,L,h]
        else:
            fed = features
        x = drafter.inputs(embeddings, fed)  # [B,L,h]
        if cos is None or sin is None:
            cos, sin = drafter.rotary(x, offsets)  # [B,L,d]
        for layer, (keys, values) in zip(drafter.layers, kept, strict=True):
            assert isinstance(layer, DraftLayer)
            q, k, v = layer.qkv(x, cos, sin)
            keys.append(k)
            values.append(v)
            x = layer.finish(x, unrolled_attention(q, keys, values, visible))
        outputs.append(x)
    return outputs


def unrolled_attention(
    q: Tensor, keys: list[Tensor], values: list[Tensor], offsets: Tensor | None = None
) -> Tensor:
    """Attention of draft step s = len(keys), as the head of this file says: a causal block and s-1 diagonals.

    Args:
        q: queries of step s, [B,H,L,d].
        keys, values: those of steps 1..s, each [B,K,L,d]; heads are grouped, never repeated.
        offsets: each row's distance from its document's start, int64 [B,L]; None when nothing is packed.

    Returns:
        [B,L,H*d].
    """
    batch, heads, length, width = q.shape
    kv_heads, steps = keys[0].shape[1], len(keys)
    q = (q * width**-0.5).view(batch, kv_heads, heads // kv_heads, length, width)  # [B,K,G,L,d]
    row = torch.arange(length, device=q.device)
    if offsets is None:
        offsets = row.expand(1, -1)
    starts = row - offsets  # [B,L]: the first column of each row's document
    block = (row <= row[:, None] - (steps - 1)) & (row >= starts[..., None])  # [B,L,L]
    scores = torch.matmul(q.flatten(2, 3), keys[0].transpose(-1, -2)).view(*q.shape[:4], length)
    parts = [scores.masked_fill(~block[:, None, None], float("-inf"))]  # [B,K,G,L,L]
    for step in range(2, steps + 1):
        back = steps - step
        score = (q * _moved(keys[step - 1], back)).sum(-1)  # [B,K,G,L]
        parts.append(score.masked_fill((offsets < back)[:, None, None], float("-inf")).unsqueeze(-1))
    weights = torch.softmax(torch.cat(parts, dim=-1) if steps > 1 else parts[0], dim=-1)
    attended = torch.matmul(weights[..., :length].flatten(2, 3), values[0]).view_as(q)
    for step in range(2, steps + 1):
        attended = attended + weights[..., length + step - 2, None] * _moved(values[step - 1], steps - step)
    return attended.permute(0, 3, 1, 2, 4).flatten(2)  # [B,L,K*G*d]


def _moved(rows: Tensor, back: int) -> Tensor:
    """[B,K,L,d] -> [B,K,1,L,d] whose row r is the given row r - back."""
    return (pad(rows, (0, 0, back, 0))[:, :, : rows.shape[2]] if back else rows).unsqueeze(2)
