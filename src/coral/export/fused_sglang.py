"""SGLang, `EAGLE3`: the EAGLE-3 layout as vLLM has it.

It numbers the target's layers by what leaves them, and reads its own key for that, see `engine_config`; it
ignores a token map, for the drafter has its own ids.
"""

from __future__ import annotations

from pathlib import Path

from coral.export import fused_vllm, sglang

FILE, KEYS = fused_vllm.FILE, fused_vllm.KEYS
READS_TARGET = False
READS_TOKEN_MAP = False
READS_HEAD = False

names, lacks, tensors = fused_vllm.names, fused_vllm.lacks, fused_vllm.tensors
config_json = fused_vllm.config_json


def command(target: str, directory: Path, token_map: Path | None) -> str:
    return sglang.command(target, directory, token_map, "EAGLE3")
