"""Llama's modules, which drafters are made of whatever their target's family.

Shapes: B sequences, N rows, H heads, K key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from coral.drafters.recurrent.sizes import LlamaSizes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Attention(nn.Module):
    """The four projections of a layer that reads rows of `width`; the product itself is
    `coral.target.attention.attend` or `unroll.unrolled_attention`.
    """

    def __init__(self, config: LlamaSizes, width: int) -> None:
        super().__init__()
        queries, keys = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B,H,N,d], key and value [B,K,N,d] of rows x [B,N,width]; query and key are rotated by cos,
        sin [B,N,d].
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = cos[:, None], sin[:, None]
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class GatedMLP(nn.Module):
    """Llama's gated feed-forward block."""

    def __init__(self, config: LlamaSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """Llama's: normed in float32, rounded, and then scaled, which torch's own does in another order."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Rotary(nn.Module):
    """Rotary tables whose frequencies stay float32: rounded to bfloat16 they would turn far positions
    wrongly.
    """

    def __init__(self, config: LlamaSizes) -> None:
        super().__init__()
        frequencies, self.scaling = _frequencies(config)
        self.inv_freq = nn.Buffer(frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [B, N, d] in the dtype of x, of positions [B, N]."""
        turns = positions[..., None].float() * self.inv_freq.to(x.device)
        turns = torch.cat((turns, turns), -1)
        return (turns.cos() * self.scaling).to(x.dtype), (turns.sin() * self.scaling).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        frequencies = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = nn.Buffer(frequencies.to(self.inv_freq.device), persistent=False)
        return self


def _frequencies(config: LlamaSizes) -> tuple[Tensor, float]:
    """Turns a position [d / 2] float32, and what cosines and sines are multiplied by."""
    rope, width = dict(config.rope_parameters), config.head_dim
    if rope["rope_type"] == "default":
        # On the meta device torch would import its compiler for this, which takes seconds.
        steps = torch.arange(0, width, 2, device="cpu").float() / width
        return 1.0 / rope["rope_theta"] ** steps, 1.0
    from transformers import LlamaConfig  # seconds to import, and rarely needed
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=width,
        rope_parameters=rope,
        max_position_embeddings=config.max_position_embeddings,
    )
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](llama)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, N, d], whose halves are the two coordinates that turn together."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def randomise(module: nn.Module) -> None:
    """Give the products of a module random weights, unless they have no memory yet."""
    for part in module.modules():
        if isinstance(part, nn.Linear) and not part.weight.is_meta:
            nn.init.normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """In which numbers x and a weight are multiplied: the weight's, or autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
