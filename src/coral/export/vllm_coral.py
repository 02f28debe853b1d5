"""vLLM with our plug-in (`coral.integrations.vllm`): as `vllm`, but our architecture and a head of ours."""

from __future__ import annotations

from typing import Any

import torch

from coral.drafters.feature import engine_config
from coral.drafters.feature.network import DrafterConfig
from coral.export import vllm
from coral.integrations.vllm import ARCHITECTURE

FILE, KEYS = vllm.FILE, vllm.KEYS
READS_TARGET = False
READS_TOKEN_MAP = False
READS_HEAD = True

names, lacks, tensors, command = vllm.names, vllm.lacks, vllm.tensors, vllm.command


def config_json(config: DrafterConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {**engine_config(config, dtype), "architectures": [ARCHITECTURE]}
