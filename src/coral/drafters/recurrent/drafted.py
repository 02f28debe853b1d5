"""Unroll a batch and gather the rows that are trained: what a drafter and its heads learn from.

Shapes: S draft steps, R trained rows (those of step 1), h hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from coral.data.features import FeatureBatch
from coral.drafters.recurrent.step import Network
from coral.drafters.recurrent.unroll import offsets_in_document, unroll


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

    @property
    def before(self) -> Tensor:
        """Where the row just before each stands among the R, int64 [R]; -1 if it is not trained."""
        sequence, row = self.sequence, self.row
        follows = (sequence[1:] == sequence[:-1]) & (row[1:] == row[:-1] + 1)
        return torch.where(pad(follows, (1, 0)), torch.arange(len(row), device=row.device), 0) - 1


def trained_rows(loss_mask: Tensor, document_starts: Tensor | None, steps: int) -> Tensor:
    """Which rows carry a loss at each step, bool [S,B,L].

    Row t predicts the feature of token t+1, from which the LM head predicts token t+2. So row t is trained if
    the target is to write token t+2 (`loss_mask` [B,L], not shifted) and that token lies in the row's
    document; at step s the first s-1 rows of a document stand for no state of decoding and are left out.
    """
    offsets = offsets_in_document(document_starts, loss_mask.shape).to(loss_mask.device)
    trained = torch.zeros_like(loss_mask, dtype=torch.bool)
    trained[:, :-2] = loss_mask[:, 2:].bool() & (offsets[:, 2:] == offsets[:, :-2] + 2)
    return torch.stack([trained & (offsets >= step) for step in range(steps)])


def draft(
    drafter: Network,
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
