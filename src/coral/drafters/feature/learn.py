"""One forward pass of training: unroll, gather the trained rows, compare with the target."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from coral.data.features import FeatureBatch
from coral.drafters.feature.learning_options import Options
from coral.drafters.feature.network import Drafter
from coral.drafters.kinds import Outcome
from coral.drafters.recurrent import candidates
from coral.drafters.recurrent.alignment import alignment_loss
from coral.drafters.recurrent.drafted import draft, trained_rows
from coral.drafters.recurrent.losses import Wanted, draft_losses, rows_at_a_time
from coral.drafters.recurrent.target_law import FrozenHead


class Learner(nn.Module):
    """Holds the drafter, so that distributed engines see one forward pass for one backward pass."""

    def __init__(self, drafter: Drafter, config: Options, precision: str = "float32") -> None:
        super().__init__()
        self.drafter = drafter
        self.config, self.precision = config, precision

    def count(self, batch: FeatureBatch) -> Tensor:
        return trained_rows(batch.loss_mask, batch.document_starts, 1).sum()

    def forward(
        self,
        batch: FeatureBatch,
        head_weight: Tensor,
        head_bias: Tensor | None,
        generator: torch.Generator,
        progress: float = 1.0,
    ) -> Outcome:
        """Run S draft steps on a batch, or one: the sums of the others are 0. `generator` (CPU) draws the
        noise, the candidates and the aligned rows.
        """
        config, features = self.config, batch.features
        read = features
        if config.noise:
            noise = torch.rand(features.shape, generator=generator).to(features.device)
            read = features + (2 * noise - 1) * config.noise
        with torch.autocast(features.device.type, torch.bfloat16, self.precision == "bfloat16"):
            drafted = draft(
                self.drafter,
                batch,
                1 if progress < config.one_step else config.steps,
                read=read,
                detach=config.detach,
                checkpoint_steps=config.checkpoint_steps,
            )
        drafts, goals, valid, sequence, row = drafted
        tokens = batch.input_ids[sequence, row + 2]
        head = FrozenHead(head_weight, head_bias, len(head_weight))
        if 0 < config.loss.candidates < len(head_weight):
            chunk = config.head_chunk or rows_at_a_time(len(head_weight))
            chosen = candidates.choose(
                goals, tokens, head_weight, head_bias, config.loss.candidates, generator, chunk
            )
            head = FrozenHead(chosen.weight, chosen.bias, chosen.certain)
            tokens = chosen.places(tokens)
        wanted = Wanted(goals, valid, tokens, drafted.before)
        losses = draft_losses(drafts, wanted, head, config.loss, config.head_chunk)
        loss = losses.total.sum()
        aligned = torch.zeros((), device=drafts.device)
        if config.alignment.kind != "none":
            views = (drafts, goals, valid, sequence, tokens)
            aligned = alignment_loss(*views, config.alignment, generator) * len(row)
            loss = loss + config.alignment.weight * aligned
        sums = {
            "rows": losses.rows,
            "correct": losses.correct,
            "regression": losses.regression,
            "cross_entropy": losses.cross_entropy,
            "top_k": losses.top_k,
        }
        absent = config.steps - len(drafts)
        sums = {name: pad(part.float(), (0, absent)) for name, part in sums.items()}
        return Outcome(loss, {**sums, "alignment": aligned.detach()})
