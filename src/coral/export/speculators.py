"""The `eagle` format of the speculators library, for archives: no engine serves it.

Versions of the library up to 0.6 read it, later ones and vLLM refuse it. It has one layer and no embedding.
The library turns by the rotary frequencies of the target, whatever the layer's config says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coral.drafters.checkpoint import engine_config
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.errors import CoralError
from coral.export import plain
from coral.export.layout import Stored
from coral.target.record import TargetRecord
from coral.target.target import Target

FILE = "model.safetensors"
KEYS = frozenset(
    {
        "architectures", "speculators_model_type", "speculators_version", "speculators_config",
        "tie_word_embeddings", "transformer_layer_architecture", "transformer_layer_config", "layernorms",
        "fusion_bias", "dtype", "torch_dtype",
    }
)  # fmt: skip
READS_TARGET = True
READS_TOKEN_MAP = False
READS_HEAD = False
VERSION = "0.6.0.2"  # the last that reads it

# A drafter's name -> the name there.
TENSORS = {"fc.weight": "fusion_fc.weight"} | {
    f"layers.0.{name}": f"transformer.{name}" for name in plain.IN_EACH_LAYER
}
BIAS = {"fc.bias": "fusion_fc.bias"}


def names(config: DrafterConfig) -> set[str]:
    return {*TENSORS.values(), *(BIAS.values() if config.fc_bias else ())}


def lacks(config: DrafterConfig) -> list[str]:
    layers = [f"drafter.num_layers {config.num_layers} (only 1)"] if config.num_layers > 1 else []
    return plain.lacks_everywhere(config) + layers


def tensors(drafter: Drafter, target: Target | None) -> dict[str, Tensor]:
    renamed = TENSORS | BIAS
    return {renamed.get(name, name): tensor for name, tensor in plain.tensors(drafter).items()}


def config_json(
    config: DrafterConfig, dtype: torch.dtype, record: TargetRecord, target: Target | None
) -> dict[str, Any]:
    assert target is not None
    whole = engine_config(config, dtype)
    own = {"architectures", "bias", "dtype", "torch_dtype"}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": 4,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "speculators_model_type": "eagle",
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": "eagle",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": record.name, "architectures": target.config.architectures},
        },
        "tie_word_embeddings": False,
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "transformer_layer_config": {key: value for key, value in whole.items() if key not in own},
        "layernorms": False,
        "fusion_bias": config.fc_bias,
        "dtype": whole["dtype"],
        "torch_dtype": whole["torch_dtype"],
    }


def command(target: str, directory: Path, token_map: Path | None) -> None:
    return None


def is_in(stored: Stored) -> bool:
    """Whether tensors have the names of this format."""
    return TENSORS["fc.weight"] in stored.tensors


def to_plain(stored: Stored) -> Stored:
    """The same in the plain EAGLE layout; tensors without a place there keep their names.

    Raises:
        CoralError: config.json holds no layer's config.
    """
    renamed = {there: ours for ours, there in (TENSORS | BIAS).items()}
    config = stored.config.get("transformer_layer_config")
    if not isinstance(config, dict):
        raise CoralError(
            f"{stored.file.with_name('config.json')} has no transformer_layer_config; copy the drafter again."
        )
    return Stored(stored.file, {renamed.get(name, name): t for name, t in stored.tensors.items()}, config)
