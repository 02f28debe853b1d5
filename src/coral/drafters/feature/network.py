"""The drafter: (feature of a token, embedding of the next one) -> feature of the next one.

The layout is plain EAGLE (arXiv 2401.15077), so that vLLM, SGLang and the EAGLE code load what is trained
here: `fc` joins the embedding and the feature, then Llama-style layers follow, of which the first has no
input norm; nothing is normalised at the end. Embedding and LM head are the target's and are not stored.

Shapes: B sequences, N rows, M rows that are attended to, h hidden size, H heads, K key/value heads, d head
size.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coral.drafters.recurrent.llama import (
    Attention,
    GatedMLP,
    RMSNorm,
    Rotary,
    product_dtype,
    randomise,
)
from coral.drafters.recurrent.sizes import LlamaSizes
from coral.drafters.recurrent.step import draft_step
from coral.errors import CoralError
from coral.json_file import Positive
from coral.target.families import embedding_scale


@dataclass(frozen=True)
class DrafterConfig(LlamaSizes):
    """The sizes of a drafter. `for_target` fills them in.

    fc_bias: `fc` has a bias, as in some published EAGLE drafters; ours are trained without, since vLLM would
    drop it.
    embedding_scale: what rows of the target's embedding are multiplied by before they enter `fc`, as the
    target multiplies them (Gemma: sqrt(h)). Beside features of rms 50 the bare rows, of 0.04, would hardly be
    learnt from. `Target.embed` gives these bare rows, and so do engines, which know no such factor: in an
    export it is part of `fc`.
    """

    num_layers: Annotated[int, Field(ge=1, le=1000)] = 1
    normalised_feedback: bool = False
    fc_bias: bool = False
    embedding_scale: Positive = 1.0

    @classmethod
    def for_target(cls, target_config: Any, **options: Any) -> Self:
        return super().for_target(
            target_config, **{"embedding_scale": embedding_scale(target_config), **options}
        )


class DraftLayer(nn.Module):
    """A Llama decoder layer in two halves, see `Network.layers`."""

    def __init__(self, config: DrafterConfig, index: int) -> None:
        super().__init__()
        if index > 0:
            self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)
        self.index = index

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B,H,N,d], key and value [B,K,N,d] of rows x [B,N,h]; query and key are rotated by cos, sin
        [B,N,d].
        """
        return self.self_attn.qkv(self.input_layernorm(x) if self.index > 0 else x, cos, sin)

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
        randomise(self)

    def inputs(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Join embeddings [B,N,h] (of token t+1) and features [B,N,h] (of token t) into rows [B,N,h]."""
        dtype, scale = product_dtype(embeddings, self.fc.weight), self.config.embedding_scale
        embeddings = embeddings.to(dtype) if scale == 1 else embeddings.to(dtype) * scale
        return self.fc(torch.cat([embeddings, features.to(dtype)], dim=-1))

    forward = draft_step

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
