"""Devices: which one this is, since measured times depend on it, and what to ask of one without waiting.

A GPU works through a queue. Reading a number from it, or copying to it from ordinary memory, waits until
everything queued before is done; then the queue is empty. A cycle of decoding waits once, for the tokens that
the target wrote (docs/cuda.md).
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

CPU = torch.device("cpu")


def has_queue(device: torch.device) -> bool:
    """Whether reading a number from the device waits for its queue."""
    return device.type != "cpu"


def upload(numbers: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Numbers on the device (ints as int64), without waiting for what is queued there."""
    here = torch.as_tensor(numbers, dtype=None if isinstance(numbers, Tensor) else torch.int64)
    if here.device.type == "cpu" and device.type == "cuda":
        here = here.pin_memory()  # a copy from pageable memory waits; this one is kept until it is done
    return here.to(device, non_blocking=has_queue(device))


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


def has_wide_vectors() -> bool:
    """Whether this CPU has vectors of 512 bits (AVX-512), as far as torch uses them."""
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 at least as fast as float32."""
    if device.type == "cpu":
        info = cpu_info()
        flags = f"{info.get('flags', '')} {info.get('Features', '')}".split()  # x86's name, and Arm's
        return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
