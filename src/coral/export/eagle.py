"""The code of EAGLE (github.com/SafeAILab/EAGLE) and HASS: pytorch_model.bin with the target's embedding.

Every version of it reads that file, and some refuse one without the embedding. The key `bias` says whether fc
has one, and means yes where it is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coral.drafters.feature import engine_config
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.drafters.recurrent.sizes import LlamaSizes
from coral.export import layout
from coral.target.target import Target
from coral.tree import DEFAULT

FILE = "pytorch_model.bin"
KEYS = layout.KEYS - {"head_dim", "rope_parameters", "dtype"}
READS_TARGET = True
READS_TOKEN_MAP = False
READS_HEAD = False


def names(config: DrafterConfig) -> set[str]:
    bias = {"fc.bias"} if config.fc_bias else set()
    return layout.names(config.num_layers) | bias | {"embed_tokens.weight"}


def lacks(config: DrafterConfig) -> list[str]:
    return layout.lacks_everywhere(config) + lacks_in_layer(config)


def lacks_in_layer(config: LlamaSizes) -> list[str]:
    """What of a Llama-shaped layer that code does not compute."""
    lacks, rope = [], config.rope_parameters
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        lacks.append(f"head_dim {config.head_dim} (only hidden_size / num_attention_heads)")
    if rope["rope_type"] not in ("default", "linear"):
        lacks.append(f"rotary type {rope['rope_type']!r} (only default and linear)")
    elif rope["rope_type"] == "linear" and (rope["rope_theta"] != 10000 or rope["factor"] <= 1):
        lacks.append("linear rotary scaling with a rope_theta other than 10000 or a factor of 1 or less")
    return lacks


def tensors(drafter: Drafter, target: Target | None) -> dict[str, Tensor]:
    assert target is not None
    embedding = target.embed(torch.arange(drafter.config.vocab_size, device=target.device))
    return {"embed_tokens.weight": embedding.to(drafter.fc.weight), **layout.tensors(drafter)}


def config_json(config: DrafterConfig, dtype: torch.dtype) -> dict[str, Any]:
    content = {key: value for key, value in engine_config(config, dtype).items() if key in KEYS}
    told = {"architectures": ["LlamaForCausalLM"], "bias": config.fc_bias}
    return {**content, "rope_scaling": rope_scaling(config), **told}


def rope_scaling(config: LlamaSizes) -> dict[str, Any] | None:
    """As that code reads it: two keys, one of them a float, or it refuses."""
    rope = config.rope_parameters
    return {"type": "linear", "factor": float(rope["factor"])} if rope["rope_type"] == "linear" else None


def command(target: str, directory: Path, token_map: Path | None, eagle3: bool = False) -> str:
    """Python, to be run in the root of the EAGLE code base; its tree counts the root and has a level more
    than its depth says.
    """
    tree = f"total_token={DEFAULT.num_nodes + 1}, depth={DEFAULT.max_depth - 1}, top_k={DEFAULT.top_k}"
    return (
        "from eagle.model.ea_model import EaModel\n"
        f"EaModel.from_pretrained(base_model_path={target!r}, ea_model_path={str(directory)!r}, {tree}, "
        f'use_eagle3={eagle3}, torch_dtype="auto", device_map="auto")'
    )
