"""Unroll a batch and gather the rows that are trained: what a drafter and its heads learn from.

Shapes: S draft steps, R trained rows (those of step 1), h hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from coral.data.features import FeatureBatch
from coral.drafters.feature.losses import trained_rows
from coral.drafters.feature.network import Drafter
from coral.drafters.feature.unroll import unroll


class Drafted(NamedTuple):
    """The trained rows of a batch, in their order in each sequence."""

    drafts: Tensor
    """Draft features, float32 [S,R,h]."""
    features: Tensor
    """The target's features of the same tokens, [R,h]."""
    valid: Tensor
    """bool [S,R], False where a row carries no loss at that step."""
    sequence: Tensor
    """The sequence of the batch that each row comes from, int64 [R]."""
    row: Tensor
    """Where in it, int64 [R]."""


def draft(
    drafter: Drafter,
    batch: FeatureBatch,
    steps: int,
    *,
    read: Tensor | None = None,
    detach: bool = True,
    checkpoint_steps: bool = False,
) -> Drafted:
    """Run S draft steps on a batch; see `unroll` for the options.

    Args:
        read: what step 1 reads in place of the target's features, [B,L,h].
    """
    outputs = unroll(
        drafter,
        batch.embeddings,
        batch.features if read is None else read,
        batch.document_starts,
        steps,
        detach,
        checkpoint_steps,
    )
    valid = trained_rows(batch.loss_mask, batch.document_starts, steps)  # [S,B,L]
    sequence, row = valid[0].nonzero(as_tuple=True)
    drafts = torch.stack([output[sequence, row] for output in outputs]).float()
    return Drafted(drafts, batch.features[sequence, row + 1], valid[:, sequence, row], sequence, row)
