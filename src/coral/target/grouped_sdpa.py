"""Our attention as an attention function of transformers; to import this is to register it there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from coral.target.attention import attend, attend_from

GROUPED_SDPA = "coral_sdpa"
"""The name of this attention in the config of a model."""


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """See `attention.attend`, and `attention.attend_from` for a mask of integers."""
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return attend_from(query, key, value, attention_mask, scaling), None
    if attention_mask is None and query.shape[2] > 1:  # what that means depends on transformers' own cache
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    return attend(query, key, value, attention_mask, scaling), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
