"""A whole draft tree in one call on the CPU: `native.cpp`, the fast twin of `proposers/feature.py`'s levels.

A draft step of a small tree is some fifteen products that each take a few microseconds, so calling them is
what it costs: 1.6 ms a level as compiled calls, 0.45 of which the weights need. Here the levels of a tree and
the choice of nodes between them, are one call on one team of threads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from coral.cache import KVCache
from coral.cpp import build
from coral.decoding.state import Committed, State
from coral.decoding.tree import Budget, DraftTree
from coral.drafter.drafter import Drafter, DraftLayer
from coral.drafter.reduced import Table
from coral.target import Target

_MULTIPLE = 16  # of every size: what a vector holds at most
MOST_ROWS = 64
"""Above this many accepted rows, as behind a prompt, libraries are better at the products."""


class NativeDrafter:
    """Grows trees with a drafter on the CPU; see `of`."""

    def __init__(self, drafter: Drafter, target: Target) -> None:
        self.drafter, self.target = drafter, target
        bias = drafter.fc.bias
        self._weights: list[Tensor | None] = [_narrow(drafter.fc), None if bias is None else bias.float()]
        for layer in drafter.layers:
            assert isinstance(layer, DraftLayer)
            a, mlp = layer.self_attn, layer.mlp
            self._weights.append(layer.input_layernorm.weight.float() if layer.index > 0 else None)
            self._weights.append(layer.post_attention_layernorm.weight.float())
            self._weights += [_narrow(p) for p in (a.q_proj, a.k_proj, a.v_proj, a.o_proj)]
            self._weights += [_narrow(p) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        self._rotation = self._rotate(0)

    @classmethod
    def of(cls, drafter: Drafter, target: Target) -> NativeDrafter | None:
        """None where there can be none: another device, number format or activation, sizes that do not fill
        vectors, or a processor whose vectors the compiler does not know.
        """
        config = drafter.config
        sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
        weights = [*drafter.parameters(), target.embedding_weight, target.head_weight]
        if (
            any(weight.device.type != "cpu" for weight in weights)
            or any(weight.dtype not in (torch.float32, torch.bfloat16) for weight in weights)
            or config.hidden_act != "silu"
            or any(size % _MULTIPLE for size in sizes)
            or not build(Path(__file__).with_suffix(".cpp"))
        ):
            return None
        return cls(drafter, target)

    def _rotate(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin [length, d] float32 of all positions."""
        cos, sin = self.drafter.rotary(torch.empty(0), torch.arange(length)[None])
        return cos[0].contiguous(), sin[0].contiguous()

    def num_bytes(self, table: Table) -> int:
        """Bytes of weights that a level reads, with this head."""
        return sum(weight.nbytes for weight in self._weights if weight is not None) + table.rows.nbytes

    def grow(
        self, state: State, pairs: Committed, cache: KVCache, table: Table, budget: Budget, pool: int
    ) -> DraftTree:
        """The tree of one sequence.

        Args:
            pairs: what was accepted behind what the cache holds, at least one and `MOST_ROWS` at most; the
                cache then has their rows, too.
            budget: with at least one level.
            pool: ids of a node that compete after the sampler's noise is added; 0: it is not.
        """
        length, n = cache.length, len(pairs.tokens)
        for layer in cache.layers:
            layer.reserve(n + budget.top_k * budget.max_depth)
        if len(self._rotation[0]) < cache.capacity + 1:
            self._rotation = self._rotate(cache.capacity + 1)
        config, sampling = self.drafter.config, state.sampling
        grown = torch.ops.coral.grow(
            pairs.tokens,
            pairs.features,
            self.target.embedding_weight,
            self._weights,
            cache.storage,
            length,
            *self._rotation,
            *table,
            config.num_attention_heads,
            config.rms_norm_eps,
            config.normalised_feedback,
            [budget.top_k, budget.max_depth, budget.num_nodes],
            budget.min_gain,
            sampling.temperature if pool else 0.0,
            _signed64(sampling.stream(state.sequence_id)),
            pool,
        )
        cache.set_length(length + n)
        return DraftTree(*grown)


def _narrow(linear: nn.Linear) -> Tensor:
    """Half the bytes to read for a rounding that no draft shows."""
    return linear.weight.bfloat16()


def _signed64(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
