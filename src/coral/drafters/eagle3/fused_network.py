"""The drafter: (states from within the target, embedding of the next token) -> the token after that.

The layout is EAGLE-3 (arXiv 2503.01840) as its published checkpoints, vLLM, SGLang and llama.cpp have it.
`fc` joins three of the target's states to a feature. One Llama-shaped layer reads embedding and feature, each
normed, side by side; what it adds to is the feature itself. Its output is the feature of the next draft step,
and, normed, what the drafter's own LM head scores: a head of the ids that are written most, the draft
vocabulary. The embedding is the target's and is not stored.

Shapes: B sequences, N rows, V vocabulary, D draft vocabulary, h hidden size, H heads, K key/value heads, d
head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coral.drafters.recurrent.llama import Attention, GatedMLP, RMSNorm, Rotary, product_dtype, randomise
from coral.drafters.recurrent.sizes import LlamaSizes
from coral.drafters.recurrent.step import draft_step
from coral.errors import CoralError
from coral.json_file import Id, Size


@dataclass(frozen=True)
class FusedConfig(LlamaSizes):
    """The sizes of a drafter.

    layers: what enters these layers of the target is fused.
    draft_vocab_size: ids that it can draft.
    fc_norm: each of the three states is normed before `fc` (EAGLE-3.1).
    norm_output: the next draft step reads the normed output (EAGLE-3.1).
    """

    layers: tuple[Id, Id, Id] = field(kw_only=True)
    draft_vocab_size: Size = field(kw_only=True)
    fc_norm: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON brings a list
        if len(set(self.layers)) != 3:
            raise CoralError(f"the layers {[*self.layers]} are not three; engines fuse three different ones.")
        if self.draft_vocab_size > self.vocab_size:
            raise CoralError(
                f"a draft vocabulary of {self.draft_vocab_size} ids is more than the target's "
                f"{self.vocab_size}; ask for fewer."
            )

    def check_sizes(self, target: Any) -> None:
        super().check_sizes(target)
        if max(self.layers) >= target.facts.num_layers:
            raise CoralError(
                f"the drafter reads what enters the layers {[*self.layers]}, but {target.name} has "
                f"{target.facts.num_layers}; use a drafter that was trained for this target."
            )


class FusedLayer(nn.Module):
    """The decoder layer in two halves, see `Network.layers`; its rows are embeddings beside features."""

    def __init__(self, config: FusedConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.hidden_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.self_attn = Attention(config, 2 * width)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = GatedMLP(config)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B,H,N,d], key and value [B,K,N,d] of rows x [B,N,2h]."""
        embeddings, features = x.chunk(2, -1)
        normed = torch.cat([self.input_layernorm(embeddings), self.hidden_norm(features)], -1)
        return self.self_attn.qkv(normed, cos, sin)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer, after attention: x [B,N,2h], attended [B,N,H*d] -> [B,N,h]."""
        x = x.chunk(2, -1)[1] + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class FusedDrafter(nn.Module):
    """See the head of this file. `fuse` makes features of the target's states; the rest is `Network`.

    d2t, t2d: how far each id of the draft vocabulary lies below the target's id, int64 [D], and which ids of
    the target it has, bool [V]; absent where it has all.
    """

    kind = "eagle3"

    def __init__(self, config: FusedConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.rms_norm_eps
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(width, eps) for _ in config.layers)
        self.fc = nn.Linear(3 * width, width, bias=False)
        self.midlayer = FusedLayer(config)
        self.norm = RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.rotary = Rotary(config)
        if config.draft_vocab_size < config.vocab_size:
            self.d2t = nn.Buffer(torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.t2d = nn.Buffer(torch.arange(config.vocab_size) < config.draft_vocab_size)
        randomise(self)

    @property
    def layers(self) -> tuple[FusedLayer]:
        return (self.midlayer,)

    @property
    def ids(self) -> Tensor:
        """The target's id of each id of the draft vocabulary, int64 [D]."""
        own = torch.arange(self.config.draft_vocab_size, device=self.fc.weight.device)
        return own + self.d2t if hasattr(self, "d2t") else own

    @torch.no_grad()
    def draft_only(self, ids: Tensor) -> None:
        """Make these ids of the target, ascending, the draft vocabulary, [D]."""
        if hasattr(self, "d2t"):
            self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
            self.t2d.zero_()[ids] = True

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Raises CoralError for a draft vocabulary that does not hold ids of the target, each once."""
        loaded = super().load_state_dict(state_dict, *args, **options)
        ids, vocabulary = self.ids, self.config.vocab_size
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary or len(ids.unique()) < len(ids):
            raise CoralError(
                f"d2t does not name {len(ids)} of the target's {vocabulary} ids, each once; copy the drafter "
                "again."
            )
        return loaded

    def fuse(self, states: Tensor) -> Tensor:
        """Features [..., h] of the target's states, side by side [..., 3h]."""
        states = states.to(product_dtype(states, self.fc.weight))
        return self.fc(torch.cat(self._states(states), -1) if self.config.fc_norm else states)

    def _states(self, states: Tensor) -> list[Tensor]:
        """The three, [..., h] each, as they enter `fc`."""
        parts = states.chunk(3, -1)
        if not self.config.fc_norm:
            return [*parts]
        return [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]

    def inputs(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Embeddings [B,N,h] (of token t+1) beside features [B,N,h] (of token t), rows [B,N,2h]."""
        dtype = product_dtype(features, self.fc.weight)
        return torch.cat([embeddings.to(dtype), features.to(dtype)], -1)

    forward = draft_step

    def feedback(self, draft_features: Tensor) -> Tensor:
        return self.norm(draft_features) if self.config.norm_output else draft_features

    def logits(self, features: Tensor) -> Tensor:
        """[..., h] as `feedback` gave it -> [..., D]."""
        return self.lm_head(features if self.config.norm_output else self.norm(features))

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def balance_states(self, states: Tensor) -> None:
        """Scale the thirds of `fc` so that the three states count alike in what it gives for rows like these
        [..., 3h], and its rows have unit RMS.

        States grow by an order of magnitude from the first layers to the last, and a text's first token can
        have one that is a thousand times larger, which the median leaves out.
        """
        for third, part in zip(self.fc.weight.chunk(3, 1), self._states(states.float()), strict=True):
            size = part.square().mean(-1).sqrt().median() * third.square().sum(1).mean().sqrt()
            if size.isfinite():  # else training will say so
                third /= 3**0.5 * size.clamp(min=torch.finfo(torch.float32).tiny)
