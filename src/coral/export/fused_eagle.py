"""The code of EAGLE, `use_eagle3=True`: the EAGLE-3 layout in pytorch_model.bin.

Its own models of the targets hand over what enters three layers that are fixed there, and it takes the
embedding from the target's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coral.drafters.eagle3 import engine_config
from coral.drafters.eagle3.fused_network import FusedConfig, FusedDrafter
from coral.export import eagle, fused_layout
from coral.target.target import Target

FILE = eagle.FILE
KEYS = fused_layout.KEYS - {"rope_parameters", "dtype"}
READS_TARGET = False
READS_TOKEN_MAP = False
READS_HEAD = False

names = fused_layout.names


def lacks(config: FusedConfig) -> list[str]:
    lacks = fused_layout.lacks_without_eagle_3_1(config) + eagle.lacks_in_layer(config)
    count = max(config.layers) + 3  # the target's layers, if these are its fixed three
    if config.layers != (2, count // 2, count - 3):
        lacks.append(f"the layers {[*config.layers]} (only 2, n // 2 and n - 3 of the target's n)")
    return lacks


def tensors(drafter: FusedDrafter, target: Target | None) -> dict[str, Tensor]:
    return dict(drafter.state_dict())


def config_json(config: FusedConfig, dtype: torch.dtype) -> dict[str, Any]:
    content = {key: value for key, value in engine_config(config, dtype).items() if key in KEYS}
    return {**content, "rope_scaling": eagle.rope_scaling(config)}


def command(target: str, directory: Path, token_map: Path | None) -> str:
    return eagle.command(target, directory, token_map, True)
