"""vLLM, `method: eagle`: the plain EAGLE layout, nothing else.

Its loader reports no missing tensor, leaves it as random memory, and drops a bias that it does not know.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coral.drafters.feature import engine_config
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.export import layout
from coral.target.target import Target

FILE = "model.safetensors"
KEYS = layout.KEYS
READS_TARGET = False
READS_TOKEN_MAP = False
READS_HEAD = False
CHAIN = 4  # draft tokens of a cycle, which vLLM drafts one behind the other


def names(config: DrafterConfig) -> set[str]:
    return layout.names(config.num_layers)


def lacks(config: DrafterConfig) -> list[str]:
    bias = ["the trained bias of fc (drafter.fc_bias)"] if config.fc_bias else []
    return layout.lacks_in_servers(config) + bias


def tensors(drafter: Drafter, target: Target | None) -> dict[str, Tensor]:
    return layout.tensors(drafter)


def config_json(config: DrafterConfig, dtype: torch.dtype) -> dict[str, Any]:
    return engine_config(config, dtype)


def command(target: str, directory: Path, token_map: Path | None, method: str = "eagle") -> str:
    drafting = {
        "method": method,
        "model": str(directory),
        "num_speculative_tokens": CHAIN,
        "draft_tensor_parallel_size": 1,
    }
    return shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(drafting)])
