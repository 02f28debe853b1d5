"""The ids that the target writes most, and no other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coral.drafters.heads.rows import Table, rows_of
from coral.drafters.heads.stored import Stored
from coral.drafters.kinds import num_bytes
from coral.files import atomic_bytes
from coral.target.target import Target


class StaticHead:
    """The LM head's rows of the ids that the target writes most (FR-Spec, arXiv 2502.14856; VocabTrim,
    arXiv 2506.22694).

    Args:
        ids: int64 [K], the ids that may be drafted.
    """

    def __init__(self, target: Target, ids: Tensor) -> None:
        self.ids = ids.to(target.head_weight.device)
        self.rows = rows_of(target, self.ids)
        self.vocab_size = target.vocab_size
        self.num_bytes = num_bytes(self.rows)

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.rows(features).float()
        values, best = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return self.ids[best], values - logits.logsumexp(-1, keepdim=True)

    def table(self, state: Any) -> Table:
        return self._table

    @cached_property
    def _table(self) -> Table:
        bias = self.rows.bias
        return Table(self.rows.weight.detach(), None if bias is None else bias.float(), self.ids, fixed=True)

    def log_probs(self, features: Tensor) -> Tensor:
        """[N, V] float32; ids that are left out have -inf."""
        dense = torch.full((len(features), self.vocab_size), float("-inf"), device=features.device)
        dense[:, self.ids] = self.rows(features).float().log_softmax(-1)
        return dense


def build(target: Target, stored: Stored) -> StaticHead:
    """Of the tensor `ids` [K]; raises ValueError where they are not this target's."""
    ids, most = stored.ids(1), target.vocab_size
    if len(ids.unique()) != len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < most:
        raise ValueError(f"it does not hold ids of {most}, each once")
    return StaticHead(target, ids)


def write_token_map(path: Path, ids: Tensor) -> None:
    """Write ids [K] as SGLang reads them (`--speculative-token-map`): a list whose i-th is the target's id
    of draft id i.

    Raises:
        CoralError: the disk refuses.
    """
    buffer = io.BytesIO()  # torch.save hides the reason of a failed write
    torch.save(ids.tolist(), buffer)
    atomic_bytes(path, buffer.getvalue())
