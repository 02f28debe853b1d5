"""One forward pass of training, whatever kind is unrolled: what comes before and after its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from coral.data.features import FeatureBatch
from coral.drafters.kinds import Outcome
from coral.drafters.recurrent.alignment import alignment_loss
from coral.drafters.recurrent.drafted import Drafted, draft, trained_rows
from coral.drafters.recurrent.losses import DraftLosses
from coral.drafters.recurrent.unroll_options import UnrollOptions


class UnrollLearner(nn.Module):
    """Holds the drafter, so that distributed engines see one forward pass for one backward pass."""

    def __init__(self, drafter: Any, config: UnrollOptions, precision: str = "float32") -> None:
        super().__init__()
        self.drafter = drafter
        self.config: Any = config
        self.precision = precision

    def count(self, batch: FeatureBatch) -> Tensor:
        return trained_rows(batch.loss_mask, batch.document_starts, 1).sum()

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, self.precision == "bfloat16")

    def unrolled(self, batch: FeatureBatch, read: Tensor, progress: float) -> Drafted:
        """S draft steps on a batch whose first one reads `read` [B,L,h], or one while `progress` is low."""
        config = self.config
        return draft(
            self.drafter,
            batch,
            1 if progress < config.one_step else config.steps,
            read=read,
            detach=config.detach,
            checkpoint_steps=config.checkpoint_steps,
        )

    def outcome(
        self,
        losses: DraftLosses,
        drafted: Drafted,
        aligned: Tensor,
        tokens: Tensor,
        generator: torch.Generator,
    ) -> Outcome:
        """Add the alignment of the rows `aligned` [S,R,h], which predict `tokens` [R]; steps that were not
        made report 0.
        """
        config, loss = self.config.alignment, losses.total.sum()
        views = (aligned, drafted.features, drafted.valid, drafted.sequence, tokens)
        alignment = torch.zeros((), device=aligned.device)
        if config.kind != "none":
            alignment = alignment_loss(*views, config, generator) * len(tokens)
            loss = loss + config.weight * alignment
        sums = {
            "rows": losses.rows,
            "correct": losses.correct,
            "regression": losses.regression,
            "cross_entropy": losses.cross_entropy,
            "top_k": losses.top_k,
        }
        absent = self.config.steps - len(aligned)
        sums = {name: pad(part.float(), (0, absent)) for name, part in sums.items()}
        return Outcome(loss, {**sums, "alignment": alignment.detach()})
