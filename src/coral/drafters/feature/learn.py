"""One forward pass of training: unroll, gather the trained rows, compare with the target."""

from __future__ import annotations

import torch
from torch import Tensor

from coral.data.features import FeatureBatch
from coral.drafters.kinds import Outcome
from coral.drafters.recurrent import candidates
from coral.drafters.recurrent.losses import Wanted, draft_losses, rows_at_a_time
from coral.drafters.recurrent.target_law import FrozenHead
from coral.drafters.recurrent.unroll_learn import UnrollLearner


class Learner(UnrollLearner):
    """Of a drafter of features; its config is the kind's `Options`."""

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
        with self.autocast(features.device):
            drafted = self.unrolled(batch, read, progress)
        drafts, goals = drafted.drafts, drafted.features
        tokens = batch.input_ids[drafted.sequence, drafted.row + 2]
        head = FrozenHead(head_weight, head_bias, len(head_weight))
        if 0 < config.loss.candidates < len(head_weight):
            chunk = config.head_chunk or rows_at_a_time(len(head_weight))
            chosen = candidates.choose(
                goals, tokens, head_weight, head_bias, config.loss.candidates, generator, chunk
            )
            head = FrozenHead(chosen.weight, chosen.bias, chosen.certain)
            tokens = chosen.places(tokens)
        wanted = Wanted(goals, drafted.valid, tokens, drafted.before)
        losses = draft_losses(drafts, wanted, head, config.loss, config.head_chunk)
        return self.outcome(losses, drafted, drafts, tokens, generator)
