"""vLLM, `method: eagle3`: the EAGLE-3 layout. EAGLE-3.1's norms need vLLM 0.32 or newer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coral.drafters.eagle3 import engine_config
from coral.drafters.eagle3.fused_network import FusedConfig, FusedDrafter
from coral.export import fused_layout, layout, vllm
from coral.target.target import Target

FILE, KEYS = vllm.FILE, fused_layout.KEYS
READS_TARGET = False
READS_TOKEN_MAP = False
READS_HEAD = False

names = fused_layout.names


def lacks(config: FusedConfig) -> list[str]:
    return layout.lacks_in_layer(config)


def tensors(drafter: FusedDrafter, target: Target | None) -> dict[str, Tensor]:
    return dict(drafter.state_dict())


def config_json(config: FusedConfig, dtype: torch.dtype) -> dict[str, Any]:
    return engine_config(config, dtype)


def command(target: str, directory: Path, token_map: Path | None) -> str:
    return vllm.command(target, directory, token_map, "eagle3")
