"""What may be asked of a device without waiting for it.

A GPU works through a queue. Whatever needs a number from it, or copies from ordinary memory to it, waits
until all that was queued before is done, and then the queue is empty. A cycle of decoding waits once, for the
tokens that the target wrote (docs/cuda.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")


def has_queue(device: torch.device) -> bool:
    """Whether to look at a number there is to wait."""
    return device.type != "cpu"


def upload(numbers: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Numbers on the device (ints as int64), without waiting for what is queued there."""
    here = torch.as_tensor(numbers, dtype=None if isinstance(numbers, Tensor) else torch.int64)
    if here.device.type == "cpu" and device.type == "cuda":
        here = here.pin_memory()  # from other memory the copy waits; the page is not reused before it is done
    return here.to(device, non_blocking=has_queue(device))
