"""SGLang, `EAGLE`: the plain EAGLE layout under another architecture, with a bias of fc in any case.

Its `fc` has a bias, and it does not say when that is missing. It drafts with fewer ids if it is given a
token map (FR-Spec), which the static head is.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coral.drafters.feature import engine_config
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.export import layout
from coral.target.target import Target
from coral.tree import DEFAULT

FILE = "model.safetensors"
KEYS = layout.KEYS
READS_TARGET = False
READS_TOKEN_MAP = True
READS_HEAD = False


def names(config: DrafterConfig) -> set[str]:
    return layout.names(config.num_layers) | {"fc.bias"}


def lacks(config: DrafterConfig) -> list[str]:
    return layout.lacks_in_servers(config)


def tensors(drafter: Drafter, target: Target | None) -> dict[str, Tensor]:
    return {"fc.bias": torch.zeros_like(drafter.fc.weight[:, 0]), **layout.tensors(drafter)}


def config_json(config: DrafterConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {**engine_config(config, dtype), "architectures": ["LlamaForCausalLMEagle"]}


def command(target: str, directory: Path, token_map: Path | None, algorithm: str = "EAGLE") -> str:
    words = ["python", "-m", "sglang.launch_server", "--model-path", target]
    words += ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(directory)]
    words += ["--speculative-num-steps", str(DEFAULT.max_depth)]
    words += ["--speculative-eagle-topk", str(DEFAULT.top_k)]
    words += ["--speculative-num-draft-tokens", str(DEFAULT.num_nodes + 1)]  # the root is counted there
    if token_map is not None:
        words += ["--speculative-token-map", str(token_map)]
    return shlex.join(words)
