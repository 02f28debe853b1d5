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
from torch.utils.checkpoint import checkpoint

from coral.drafters.recurrent.causal import causal_attention
from coral.drafters.recurrent.step import Network

Kept = list[tuple[list[Tensor], list[Tensor]]]
"""For each layer the keys and the values of the steps so far, each [B,K,L,d]."""


def offsets_in_document(document_starts: Tensor | None, shape: torch.Size) -> Tensor:
    """Each row's distance from the start of its document, int64 [B,L]; without starts a sequence is one
    document.
    """
    columns = torch.arange(shape[1], device=None if document_starts is None else document_starts.device)
    if document_starts is None:
        return columns.expand(shape[0], -1)
    return columns - torch.where(document_starts, columns, 0).cummax(dim=1).values


def unroll(
    drafter: Network,
    embeddings: Tensor,
    features: Tensor,
    document_starts: Tensor | None,
    steps: int,
    detach: bool = True,
    checkpoint_steps: bool = False,
) -> list[Tensor]:
    """Draft features [B,L,h] of every step: row r of step s predicts the feature of token r+1.

    Args:
        embeddings: the embedding of token r+1 at row r, [B,L,h].
        features: the target's feature of token r at row r, [B,L,h].
        document_starts: bool [B,L], True where a packed document starts; None when nothing is packed.
        detach: stop gradients between a step's output and the next step's input (HASS does).
        checkpoint_steps: keep only each step's input, output, keys and values for the backward pass, which
            computes the rest again.

    Rows that lie less than s-1 rows into their document stand for no state of decoding at step s: their
    values are finite and without meaning, and no loss may read them.
    """
    offsets = offsets_in_document(document_starts, features.shape[:2]).to(features.device)  # [B,L]
    packed = document_starts is not None
    kept: Kept = [([], []) for _ in drafter.layers]
    outputs: list[Tensor] = []
    for _ in range(steps):
        if outputs:
            drafted = drafter.feedback(outputs[-1].detach() if detach else outputs[-1])
            moved = pad(drafted, (0, 0, 1, 0))[:, :-1].to(features.dtype)  # row r reads row r-1
            fed = torch.where((offsets == 0).unsqueeze(-1), features, moved)  # [B,L,h]
        else:
            fed = features
        arguments = (drafter, embeddings, fed, offsets, packed, kept)
        if checkpoint_steps and torch.is_grad_enabled():
            output, kept = checkpoint(_draft_step, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            output, kept = _draft_step(*arguments)
        outputs.append(output)
    return outputs


def _draft_step(
    drafter: Network, embeddings: Tensor, fed: Tensor, offsets: Tensor, packed: bool, kept: Kept
) -> tuple[Tensor, Kept]:
    """One draft step on inputs [B,L,h]: its output [B,L,h], and `kept` with its keys and values."""
    x = drafter.inputs(embeddings, fed)  # [B,L,h]
    cos, sin = drafter.rotary(x, offsets)  # [B,L,d]
    grown: Kept = []
    for layer, (keys, values) in zip(drafter.layers, kept, strict=True):
        q, k, v = layer.qkv(x, cos, sin)
        grown.append(([*keys, k], [*values, v]))
        x = layer.finish(x, unrolled_attention(q, *grown[-1], offsets if packed else None))
    return x, grown


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
    length, width = q.shape[2:]
    kv_heads, steps = keys[0].shape[1], len(keys)
    q = (q * width**-0.5).unflatten(1, (kv_heads, -1))  # [B,K,G,L,d]
    row = torch.arange(length, device=q.device)
    starts = None if offsets is None else row - offsets  # [B,L]: the first column of each row's document
    attended, log_sum = causal_attention(q, keys[0], values[0], steps - 1, starts)
    if steps > 1:
        scores = [log_sum]  # the block counts as one key whose score is its log-normaliser
        offsets = row[None] if offsets is None else offsets
        for step in range(2, steps + 1):
            back = steps - step
            score = (q * _moved(keys[step - 1], back)).sum(-1).to(log_sum.dtype)  # [B,K,G,L]
            scores.append(score.masked_fill((offsets < back)[:, None, None], float("-inf")))
        weights = torch.softmax(torch.stack(scores, dim=-1), dim=-1).to(q.dtype)  # [B,K,G,L,s]
        attended = attended * weights[..., :1]
        for step in range(2, steps + 1):
            moved = _moved(values[step - 1], steps - step)
            attended = torch.addcmul(attended, weights[..., step - 1, None], moved)
    return attended.permute(0, 3, 1, 2, 4).flatten(2)  # [B,L,K*G*d]


def _moved(rows: Tensor, back: int) -> Tensor:
    """[B,K,L,d] -> [B,K,1,L,d] whose row r is the given row r - back."""
    return (pad(rows, (0, 0, back, 0))[:, :, : rows.shape[2]] if back else rows).unsqueeze(2)
