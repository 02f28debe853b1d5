"""What a low-rank head is made from: where draft features lie."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor

from coral.data.features import FeatureSource, Rows, feature_batch
from coral.data.progress import bar
from coral.drafter.drafter import Drafter
from coral.training.losses import trained_rows
from coral.training.state import random_generator
from coral.training.unroll import unroll


@torch.no_grad()
def second_moment(
    target: FeatureSource,
    drafter: Drafter,
    dataset: Rows,
    batches: int,
    *,
    batch_size: int = 8,
    steps: int = 4,
    seed: int = 0,
    console: Console | None = None,
) -> Tensor:
    """E[f f^T] [h, h] float32 over the draft features f of all draft steps, on random rows of data."""
    order = torch.randperm(len(dataset), generator=random_generator(seed)).tolist()
    width = drafter.config.hidden_size
    moment, count = torch.zeros(width, width, device=target.device), 0
    with bar(console, "draft features", batches) as advance:
        for start in range(0, min(batches * batch_size, len(order)), batch_size):
            batch = feature_batch(target, dataset, order[start : start + batch_size])
            outputs = unroll(drafter, batch.embeddings, batch.features, batch.document_starts, steps)
            valid = trained_rows(batch.loss_mask, batch.document_starts, steps)  # [S,B,L]
            drafts = torch.stack(outputs)[valid].float()  # [N,h]
            moment += drafts.T @ drafts
            count += len(drafts)
            advance(1)
    return moment / max(count, 1)
