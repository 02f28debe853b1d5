"""The plain EAGLE layout: what the formats of vLLM, SGLang and the EAGLE code have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from coral.drafters.feature.network import Drafter, DrafterConfig

ONCE = ("fc.weight",)
IN_EACH_LAYER = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "post_attention_layernorm.weight",
)
BUT_IN_THE_FIRST = ("input_layernorm.weight",)

KEYS = frozenset(
    {
        "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "vocab_size",
        "max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings",
        "bias", "dtype", "torch_dtype",
    }
)  # fmt: skip


def names(num_layers: int) -> set[str]:
    """The tensors of a drafter of some layers, without bias."""
    every = {f"layers.{i}.{name}" for i in range(num_layers) for name in IN_EACH_LAYER}
    later = {f"layers.{i}.{name}" for i in range(1, num_layers) for name in BUT_IN_THE_FIRST}
    return {*ONCE} | every | later


def tensors(drafter: Drafter) -> dict[str, Tensor]:
    """A drafter's tensors for engines, which give it the target's embedding as it is stored: where ours
    multiplies that (Gemma), the factor is in fc's weights.
    """
    own, scale = dict(drafter.state_dict()), drafter.config.embedding_scale
    if scale != 1:
        embedding, feature = own["fc.weight"].chunk(2, dim=1)
        own["fc.weight"] = torch.cat([embedding * scale, feature], dim=1)
    return own


def lacks_everywhere(config: DrafterConfig) -> list[str]:
    """What no other engine computes."""
    if config.normalised_feedback:
        return ["drafter.normalised_feedback (draft features are normalised before they are fed back)"]
    return []


def lacks_in_servers(config: DrafterConfig) -> list[str]:
    """What neither vLLM nor SGLang computes, in any number of layers."""
    lacks, rope = lacks_everywhere(config), config.rope_parameters
    if config.hidden_act != "silu":
        lacks.append(f"hidden_act {config.hidden_act!r} (only silu)")
    if rope["rope_type"] == "yarn" and "original_max_position_embeddings" not in rope:
        lacks.append("rotary type 'yarn' without original_max_position_embeddings")
    return lacks
