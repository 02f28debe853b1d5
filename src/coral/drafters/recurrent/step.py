"""A draft step: what training unrolls and decoding repeats, for every kind that reads its own outputs.

Shapes: B sequences, N rows, M rows that are attended to, h hidden size, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from coral.cache import Layer
from coral.drafters.recurrent.llama import Rotary
from coral.target.attention import attend


class Network(Protocol):
    """The parts of a drafter that a draft step is made of.

    Row t gets the embedding of token t+1 and a feature of token t, stands at position t, and gives the draft
    feature that token t+2 is drafted with.
    """

    rotary: Rotary

    @property
    def layers(self) -> Any:
        """Decoder layers in two halves, so that decoding and the unroll attend each in its own way:
        `qkv(x, cos, sin)` and `finish(x, attended)`.
        """
        ...

    def inputs(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """What the first layer reads of embeddings and features [B,N,h]."""
        ...

    def feedback(self, draft_features: Tensor) -> Tensor:
        """What the next draft step reads as its features, [B,N,h]."""
        ...


def draft_step(
    drafter: Network,
    embeddings: Tensor,
    features: Tensor,
    positions: Tensor,
    cache: Sequence[Layer] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Draft features [B,N,h] of rows made from embeddings and features [B,N,h] at positions [B,N] (int64).

    With the layers of a cache, each layer appends its keys and values and attends to all M of them. `mask` is
    bool, [N,M] or [B,N,M] or [B,1,N,M], True = may attend; without one the rows are taken as the last N of a
    causal sequence.
    """
    x = drafter.inputs(embeddings, features)
    cos, sin = drafter.rotary(x, positions)  # [B,N,d]
    for index, layer in enumerate(drafter.layers):
        q, k, v = layer.qkv(x, cos, sin)
        if cache is not None:
            k, v = cache[index].update(k, v)
        x = layer.finish(x, attend(q, k, v, mask).flatten(2))
    return x
