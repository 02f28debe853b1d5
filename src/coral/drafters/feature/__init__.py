"""Drafters of the target's features: EAGLE-1, EAGLE-2, HASS and CORAL. A kind, see `coral.drafters.kinds`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coral.drafters.feature.learning_options import Options
from coral.drafters.feature.network import Drafter
from coral.drafters.feature.network import DrafterConfig as Config

if TYPE_CHECKING:
    from coral.data.features import FeatureBatch
    from coral.decoding.cycle import Proposer
    from coral.drafters.feature.learn import Learner
    from coral.drafters.heads.store import Head
    from coral.drafters.recurrent.drafted import Drafted
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

    A drafter that has an fc bias has the architecture of SGLang, which uses the bias; vLLM, which would drop
    it, does not know that architecture and refuses.
    """
    architecture = "LlamaForCausalLMEagle" if config.fc_bias else "LlamaForCausalLM"
    return config.for_engines(architecture, config.num_layers, dtype)


def new(
    target: Any, options: Options, batch: FeatureBatch, seed: int, counts: Callable[[], Tensor]
) -> Drafter:
    from coral.drafters.feature.begin import new_drafter

    return new_drafter(target, options.drafter, batch, seed)


def learner(drafter: Drafter, config: Any) -> Learner:
    from coral.drafters.feature.learn import Learner

    return Learner(drafter, config, config.precision)


def draft(drafter: Drafter, batch: FeatureBatch, steps: int) -> Drafted:
    from coral.drafters.recurrent.drafted import draft

    return draft(drafter, batch, steps)


def proposer(drafter: Drafter, target: Target, head: Head | None, coupled: bool) -> Proposer:
    from coral.drafters.feature.propose import Feature

    return Feature(drafter, target, head, coupled)
