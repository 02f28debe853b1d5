"""Drafters of the target's features: EAGLE-1, EAGLE-2, HASS and CORAL. A kind, see `coral.drafters.kinds`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from coral.drafters.feature.learning_options import Options
from coral.drafters.feature.network import Drafter
from coral.drafters.feature.network import DrafterConfig as Config

if TYPE_CHECKING:
    from coral.data.features import FeatureBatch
    from coral.decoding.cycle import Proposer
    from coral.drafters.feature.drafted import Drafted
    from coral.drafters.feature.learn import Learner
    from coral.drafters.heads.store import Head
    from coral.target.target import Target

__all__ = [
    "Config",
    "Drafter",
    "Options",
    "draft",
    "engine_config",
    "inner",
    "layers",
    "learner",
    "new",
    "proposer",
]


def layers(config: Config) -> tuple[int, ...]:
    """The vector that enters the target's LM head, after the final norm."""
    return (-1,)


def inner(target: Any, options: Options) -> tuple[int, ...]:
    return ()


def engine_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """What vLLM and SGLang read: the config.json of a plain EAGLE directory.

    `bias` is the EAGLE code's word for fc's bias, which other engines read as attention bias: it is always
    false here. A drafter that has an fc bias has the architecture of SGLang, which uses the bias; vLLM, which
    would drop it, does not know that architecture and refuses.
    """
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLMEagle" if config.fc_bias else "LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "tie_word_embeddings": False,
        "bias": False,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def new(target: Any, options: Options, batch: FeatureBatch, seed: int) -> Drafter:
    from coral.drafters.feature.begin import new_drafter

    return new_drafter(target, options.drafter, batch, seed)


def learner(drafter: Drafter, config: Any) -> Learner:
    from coral.drafters.feature.learn import Learner

    return Learner(drafter, config, config.precision)


def draft(drafter: Drafter, batch: FeatureBatch, steps: int) -> Drafted:
    from coral.drafters.feature.drafted import draft

    return draft(drafter, batch, steps)


def proposer(drafter: Drafter, target: Target, head: Head | None, coupled: bool) -> Proposer:
    from coral.drafters.feature.propose import Feature

    return Feature(drafter, target, head, coupled)
