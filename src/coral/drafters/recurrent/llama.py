"""Llama's norm and rotary embedding, which drafters share whatever their target's family."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from coral.drafters.feature.network import DrafterConfig


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

    def __init__(self, config: DrafterConfig) -> None:
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


def _frequencies(config: DrafterConfig) -> tuple[Tensor, float]:
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
