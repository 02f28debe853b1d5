"""Drafters of fused states: EAGLE-3 (arXiv 2503.01840), also with the alignment of CORAL. A kind, see
`coral.drafters.kinds`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coral.drafters.eagle3.fused_network import FusedConfig as Config
from coral.drafters.eagle3.fused_network import FusedDrafter as Drafter
from coral.drafters.eagle3.fused_options import Options

if TYPE_CHECKING:
    from coral.data.features import FeatureBatch
    from coral.decoding.cycle import Proposer
    from coral.drafters.eagle3.fused_learn import FusedLearner
    from coral.target.target import Target

__all__ = ["Config", "Drafter", "Options", "engine_config", "inner", "layers", "learner", "new", "proposer"]

draft = None  # it has its own head, so none is made for it


def layers(config: Config) -> tuple[int, ...]:
    return config.layers


def inner(target: Any, options: Options) -> tuple[int, ...]:
    from coral.drafters.eagle3.fused_start import layers_of

    return layers_of(target, options.drafter)


def engine_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """What vLLM and SGLang read: the config.json of an EAGLE-3 directory.

    vLLM and llama.cpp number the layers by what enters them, SGLang by what leaves them.
    """
    return {
        **config.for_engines("LlamaForCausalLMEagle3", 1, dtype),
        "draft_vocab_size": config.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": [*config.layers],
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in config.layers],
        },
        "norm_before_residual": False,  # vLLM takes it for true in a directory of speculators
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
    }


def new(
    target: Any, options: Options, batch: FeatureBatch, seed: int, counts: Callable[[], Tensor]
) -> Drafter:
    from coral.drafters.eagle3.fused_start import new_drafter

    return new_drafter(target, options.drafter, batch, seed, counts)


def learner(drafter: Drafter, config: Any) -> FusedLearner:
    from coral.drafters.eagle3.fused_learn import FusedLearner

    return FusedLearner(drafter, config, config.precision)


def proposer(drafter: Drafter, target: Target, head: None, coupled: bool) -> Proposer:
    from coral.drafters.eagle3.fused_propose import Fused

    return Fused(drafter, target, coupled)
