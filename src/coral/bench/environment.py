"""The machine and software of a measurement: enough to judge whether another machine should give the same."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.import_utils import is_sklearn_available

from coral.device import cpu_info, device_name

_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware, software and threads of this process."""
    flags = set(cpu_info().get("flags", "").split())
    return {
        "hardware": device_name(device or torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        # With it transformers adapts how confident an assistant has to be to go on.
        "scikit_learn": is_sklearn_available(),
        "platform": platform.platform(),
        "cpu_features": {name: name in flags for name in _CPU_FEATURES},
    }


def commit() -> str:
    """The commit of this source tree, with "+" when it has changes; the package's version outside a tree."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        # An installed copy may lie inside another project's tree: ask only about files that git tracks.
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
        if tracked.returncode == 0:
            return head.strip() + ("+" if dirty.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        return f"coral-drafter {version('coral-drafter')}"
    except PackageNotFoundError:
        return "unknown"
