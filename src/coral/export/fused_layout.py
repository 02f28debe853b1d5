"""The EAGLE-3 layout: the tensors that vLLM, SGLang and the EAGLE code read, under the names of ours.

The embedding is the target's and left out: each of them takes it from there. `d2t` and `t2d` are left out
where a drafter has all ids of the target, as vLLM wants.
"""

from __future__ import annotations

from coral.drafters.eagle3.fused_network import FusedConfig, FusedDrafter
from coral.export import layout

KIND = FusedDrafter.kind
"""The kind of the drafters that this layout is of."""

IN_THE_LAYER = (*layout.IN_EACH_LAYER, "input_layernorm.weight", "hidden_norm.weight")
ONCE = ("fc.weight", "norm.weight", "lm_head.weight")
IDS = ("d2t", "t2d")
FC_NORM = tuple(f"fc_norm.{i}.weight" for i in range(3))

KEYS = layout.KEYS | {
    "draft_vocab_size", "eagle_aux_hidden_state_layer_ids", "eagle_config", "norm_before_residual", "fc_norm",
    "norm_output",
}  # fmt: skip


def names(config: FusedConfig) -> set[str]:
    own = {*IDS} if config.draft_vocab_size < config.vocab_size else set()
    norms = {*FC_NORM} if config.fc_norm else set()
    return {*ONCE, *(f"midlayer.{name}" for name in IN_THE_LAYER)} | own | norms


def lacks_without_eagle_3_1(config: FusedConfig) -> list[str]:
    """What engines that know no EAGLE-3.1 do not compute."""
    newer = {
        "fc_norm": "drafter.fc_norm (each state is normed before fc, EAGLE-3.1)",
        "norm_output": "drafter.norm_output (draft features are normed before they are fed back, EAGLE-3.1)",
    }
    return [words for name, words in newer.items() if getattr(config, name)]
