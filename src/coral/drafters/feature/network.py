"""The drafter: (feature of a token, embedding of the next one) -> feature of the next one.

The layout is plain EAGLE (arXiv 2401.15077), so that vLLM, SGLang and the EAGLE code load what is trained
here: `fc` joins the embedding and the feature, then Llama-style layers follow, of which the first has no
input norm; nothing is normalised at the end. Embedding and LM head are the target's and are not stored.

Shapes: B sequences, N rows, M rows that are attended to, h hidden size, H heads, K key/value heads, d head
size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coral.cache import Layer
from coral.drafters.recurrent.llama import RMSNorm, Rotary, rotate
from coral.errors import CoralError
from coral.json_file import Positive, Size
from coral.target.attention import attend
from coral.target.families import embedding_scale, rotations

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
# Rotary types whose frequencies are the same at every length, so a cached key never goes out of date.
_FIXED_ROTARY = {"default", "linear", "llama3", "yarn"}


@dataclass(frozen=True)
class DrafterConfig:
    """The sizes of a drafter. `for_target` fills them in.

    fc_bias: `fc` has a bias, as in some published EAGLE drafters; ours are trained without, since vLLM would
    drop it.
    embedding_scale: what rows of the target's embedding are multiplied by before they enter `fc`, as the
    target multiplies them (Gemma: sqrt(h)). Beside features of rms 50 the bare rows, of 0.04, would hardly be
    learnt from. `Target.embed` gives these bare rows, and so do engines, which know no such factor: in an
    export it is part of `fc`.
    """

    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    vocab_size: Size
    num_layers: Annotated[int, Field(ge=1, le=1000)] = 1
    rms_norm_eps: Annotated[float, Field(ge=0, le=1)] = 1e-6
    hidden_act: str = "silu"
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    max_position_embeddings: Size = 2048
    normalised_feedback: bool = False
    fc_bias: bool = False
    embedding_scale: Positive = 1.0

    def __post_init__(self) -> None:
        """Raises CoralError for options that make no drafter, whatever its weights."""
        heads, theta = self.num_attention_heads, self.rope_parameters.get("rope_theta")
        if heads % self.num_key_value_heads or self.head_dim % 2 or self.hidden_size % heads:
            raise CoralError(
                f"{heads} heads of {self.head_dim} with {self.num_key_value_heads} key/value heads make no "
                f"drafter of width {self.hidden_size}; heads come in equal groups, their size is even, and "
                "engines divide the width by their number."
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise CoralError(f"hidden_act {self.hidden_act!r} is not known; use {', '.join(_ACTIVATIONS)}.")
        rotary = self.rope_parameters.get("rope_type")
        known = isinstance(rotary, str) and rotary in _FIXED_ROTARY
        if not known or not isinstance(theta, int | float) or not 0 < theta < math.inf:
            raise CoralError(
                f"rope_type {rotary!r} with rope_theta {theta!r} is no rotary embedding of a drafter; use "
                f"{', '.join(sorted(_FIXED_ROTARY))}, and a number above 0."
            )

    def check_sizes(self, target: Any) -> None:
        """Raise CoralError unless the drafter reads and predicts what a target has."""
        for name in ("vocab_size", "hidden_size"):
            ours, theirs = getattr(self, name), getattr(target, name)
            if ours != theirs:
                raise CoralError(
                    f"the drafter's {name} is {ours}, but {target.name} has {theirs}; use a drafter that was "
                    "trained for this target."
                )

    @classmethod
    def for_target(cls, target_config: Any, **options: Any) -> "DrafterConfig":
        """A drafter of the target's own width, Llama-style whatever the target's family; `options` override.

        Rotary types that change with the length (dynamic, longrope) are replaced by the plain one with the
        same theta: the drafter is trained from scratch and needs no long-context correction of someone else's
        weights.
        """
        heads = target_config.num_attention_heads
        ropes = rotations(target_config)  # where layers differ: of those that see everything, as ours do
        rope = ropes[None] if None in ropes else ropes["full_attention"]
        rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
        if rope.get("rope_type", "default") not in _FIXED_ROTARY:
            rope = {"rope_theta": rope.get("rope_theta", 10000.0)}
        sizes = {
            "hidden_size": target_config.hidden_size,
            "intermediate_size": target_config.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(target_config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
            "vocab_size": target_config.vocab_size,
            "rms_norm_eps": getattr(target_config, "rms_norm_eps", 1e-6),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
            "max_position_embeddings": target_config.max_position_embeddings,
            "embedding_scale": embedding_scale(target_config),
        }
        return cls(**{**sizes, **options})


class Attention(nn.Module):
    """The four projections of a layer; the product itself is `coral.target.attention.attend` or
    `unroll.unrolled_attention`.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        width, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=False)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)


class GatedMLP(nn.Module):
    """Llama's gated feed-forward block."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """A Llama decoder layer in two halves, so that decoding and the training unroll attend each in its own
    way.
    """

    def __init__(self, config: DrafterConfig, index: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        if index > 0:
            self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)
        self.index = index

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B,H,N,d], key and value [B,K,N,d] of rows x [B,N,h]; query and key are rotated by cos, sin
        [B,N,d].
        """
        normed = self.input_layernorm(x) if self.index > 0 else x
        q, k, v = (
            projection(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)
        )
        cos, sin = cos[:, None], sin[:, None]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer, after attention: x [B,N,h], attended [B,N,H*d] -> [B,N,h]."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Drafter(nn.Module):
    """Predicts the target's next feature; see the head of this file for its layout.

    Row t gets the embedding of token t+1 and the feature f_t, stands at position t, and predicts f_{t+1}.
    """

    kind = "feature"

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList(DraftLayer(config, index) for index in range(config.num_layers))
        self.rotary = Rotary(config)
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def inputs(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Join embeddings [B,N,h] (of token t+1) and features [B,N,h] (of token t) into rows [B,N,h]."""
        kind, dtype, scale = embeddings.device.type, self.fc.weight.dtype, self.config.embedding_scale
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        embeddings = embeddings.to(dtype) if scale == 1 else embeddings.to(dtype) * scale
        return self.fc(torch.cat([embeddings, features.to(dtype)], dim=-1))

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        positions: Tensor,
        cache: Sequence[Layer] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Draft features [B,N,h] of rows made from embeddings and features [B,N,h] at positions [B,N]
        (int64).

        With the layers of a cache, each layer appends its keys and values and attends to all M of them.
        `mask` is bool, [N,M] or [B,N,M] or [B,1,N,M], True = may attend; without one the rows are taken as
        the last N of a causal sequence.
        """
        x = self.inputs(embeddings, features)  # [B,N,h]
        cos, sin = self.rotary(x, positions)  # [B,N,d]
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DraftLayer)
            q, k, v = layer.qkv(x, cos, sin)
            if cache is not None:
                k, v = cache[index].update(k, v)
            x = layer.finish(x, attend(q, k, v, mask).flatten(2))
        return x

    def feedback(self, draft_features: Tensor) -> Tensor:
        """What the next draft step reads as its features: the draft features, brought to unit RMS if so
        configured.
        """
        if not self.config.normalised_feedback:
            return draft_features
        return F.rms_norm(draft_features, draft_features.shape[-1:], eps=self.config.rms_norm_eps)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def balance_inputs(self, embeddings: Tensor, features: Tensor) -> None:
        """Scale both halves of `fc` so that embeddings and features like these, [N,h] as they enter it, count
        alike in what it gives, and its rows have unit RMS.

        In a trained target an embedding is 10 to 400 times as small as a feature, so that with weights of one
        size a drafter would hardly see which token it drafts after.
        """
        for half, rows in zip(self.fc.weight.chunk(2, dim=1), (embeddings, features), strict=True):
            size = rows.float().square().mean().sqrt() * half.square().sum(1).mean().sqrt()
            if size.isfinite():  # else training will say so
                half /= 2**0.5 * size.clamp(min=torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def init_from_layer(self, target_layer: nn.Module) -> None:
        """Copy a decoder layer of the target into layer 0; the input norm, which layer 0 lacks, is left
        behind.

        Raises:
            CoralError: the target's layer is not Llama's (other tensors, biases) or has other sizes.
        """
        source = {k: v for k, v in target_layer.state_dict().items() if k != "input_layernorm.weight"}
        own = self.layers[0].state_dict()
        if odd := sorted(source.keys() ^ own.keys()):
            raise CoralError(
                f"cannot start the drafter from this target's layer: only one of the two has "
                f"{', '.join(odd)}; leave out the initialisation from a layer."
            )
        for name, tensor in own.items():
            if tensor.shape != source[name].shape:
                raise CoralError(
                    f"cannot start the drafter from this target's layer: {name} has shape "
                    f"{tuple(source[name].shape)} there and {tuple(tensor.shape)} here; keep the target's "
                    "sizes or leave the initialisation out."
                )
            tensor.copy_(source[name])

    @torch.no_grad()
    def init_from_drafter(self, source: "Drafter") -> None:
        """Copy a drafter that has as many layers and as wide a feed-forward block, or less.

        What this one has more of adds nothing at first, so that both compute the same. They may differ in
        `normalised_feedback`, which draft step 1 does not use.

        Raises:
            CoralError: the two differ in more than this, or the source is larger.
        """
        more = {size: getattr(self.config, size) for size in ("intermediate_size", "num_layers")}
        larger = any(getattr(source.config, size) > value for size, value in more.items())
        free = {**more, "normalised_feedback": self.config.normalised_feedback}
        if larger or replace(source.config, **free) != self.config:
            raise CoralError(
                f"cannot start from a drafter of {source.config}, since {self.config} is asked for; only "
                f"{' and '.join(more)} may be larger."
            )
        given = source.state_dict()
        for name, tensor in self.state_dict().items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()
            if name in given:
                tensor[tuple(slice(size) for size in given[name].shape)] = given[name]
