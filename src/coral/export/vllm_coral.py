"""vLLM with our plug-in (`coral.vllm_plugin`): as `vllm`, under our architecture and with a head of ours."""

from __future__ import annotations

from typing import Any

import torch

from coral.drafter.checkpoint import TargetRecord, engine_config
from coral.drafter.drafter import DrafterConfig
from coral.export import vllm
from coral.target import Target
from coral.vllm_plugin import ARCHITECTURE

FILE, KEYS = vllm.FILE, vllm.KEYS
READS_TARGET = False
READS_TOKEN_MAP = False
READS_HEAD = True

names, lacks, tensors, command = vllm.names, vllm.lacks, vllm.tensors, vllm.command


def config_json(
    config: DrafterConfig, dtype: torch.dtype, record: TargetRecord, target: Target | None
) -> dict[str, Any]:
    return {**engine_config(config, dtype), "architectures": [ARCHITECTURE]}
