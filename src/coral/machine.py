"""Which machine this is: what a time that was measured here depends on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return cpu_info().get("model name", platform.machine())
    return device.type


def cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.split("\n") if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are at least as fast as those of float32 there."""
    if device.type == "cpu":
        info = cpu_info()
        flags = f"{info.get('flags', '')} {info.get('Features', '')}".split()  # x86's name, and Arm's
        return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
