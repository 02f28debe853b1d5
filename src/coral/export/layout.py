"""The plain EAGLE layout: what all formats of engines have in common, and how a drafter is made of it."""

import re
from pathlib import Path

import torch
from torch import Tensor

from coral.drafters.checkpoint import check_names, check_tensors
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.drafters.recurrent.sizes import LlamaSizes
from coral.export.published import EagleTarget, Stored, check_rows, drop_biases, open_, reading, sizes_of

KIND = Drafter.kind
"""The kind of the drafters that this layout is of."""

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
    return lacks_everywhere(config) + lacks_in_layer(config)


def lacks_in_layer(config: LlamaSizes) -> list[str]:
    """The same of a Llama-shaped layer."""
    lacks, rope = [], config.rope_parameters
    if config.hidden_act != "silu":
        lacks.append(f"hidden_act {config.hidden_act!r} (only silu)")
    if rope["rope_type"] == "yarn" and "original_max_position_embeddings" not in rope:
        lacks.append("rotary type 'yarn' without original_max_position_embeddings")
    return lacks


def read(directory: Path, target: EagleTarget) -> Drafter:
    """The drafter in a plain EAGLE directory; see `open_` and `build`."""
    return build(open_(directory), target)


def build(stored: Stored, target: EagleTarget) -> Drafter:
    """The drafter that is stored in the plain EAGLE layout, in its dtype, ready to run with `target`.

    Biases that are zero are dropped, as are an embedding and an LM head that are the target's.

    Raises:
        CoralError: a tensor that is missing, left over or of another shape; a bias that is not zero, but for
            fc's; another hidden size, embedding or LM head than the target's; a rotary type that changes
            with the length.
    """
    file, tensors = stored.file, dict(stored.tensors)
    drop_biases(file, tensors)
    embedding, head = tensors.pop("embed_tokens.weight", None), tensors.pop("lm_head.weight", None)
    num_layers = max(1, len({match[1] for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}))
    bias = "fc.bias" in tensors
    smallest = DrafterConfig(2, 2, 1, 1, 2, 2, num_layers=num_layers, fc_bias=bias)  # has all's names
    check_names(file, Drafter(smallest).state_dict().keys(), tensors.keys())
    with reading(stored.config_file):
        sizes = sizes_of(stored, "layers.0.", target)
        drafter = Drafter(DrafterConfig(**sizes, num_layers=num_layers, fc_bias=bias))
    check_tensors(file, {name: t.shape for name, t in drafter.state_dict().items()}, tensors)
    if embedding is not None:
        check_rows(file, "embed_tokens.weight", embedding, target, target.embed)
    if head is not None:
        weight = target.head_weight
        check_rows(file, "lm_head.weight", head, target, lambda ids: weight[ids.to(weight.device)])
    drafter = drafter.to(dtype=tensors["fc.weight"].dtype)
    drafter.load_state_dict(tensors)
    return drafter.eval().requires_grad_(False)
