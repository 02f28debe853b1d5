"""One forward pass of training: fuse, unroll, compare with the target on the draft vocabulary.

Shapes: S draft steps, R trained rows, V vocabulary, C ids that are scored, D of them in the draft vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from coral.data.features import FeatureBatch
from coral.drafters.kinds import Outcome
from coral.drafters.recurrent import candidates
from coral.drafters.recurrent.losses import Wanted, draft_losses, rows_at_a_time
from coral.drafters.recurrent.target_law import FrozenHead, OwnHead
from coral.drafters.recurrent.unroll_learn import UnrollLearner


class _Scored(NamedTuple):
    """The ids that a batch is scored on, those of the draft vocabulary first."""

    head: FrozenHead
    """The target's, C rows."""
    own: OwnHead
    """The drafter's, D rows."""
    tokens: Tensor
    """Which of the C each row is to predict, int64 [R]."""


class FusedLearner(UnrollLearner):
    """Of a drafter of fused states; its config is the kind's `Options`."""

    def forward(
        self,
        batch: FeatureBatch,
        head_weight: Tensor,
        head_bias: Tensor | None,
        generator: torch.Generator,
        progress: float = 1.0,
    ) -> Outcome:
        """Run S draft steps on a batch, or one: the sums of the others are 0. `generator` (CPU) draws the
        candidates and the aligned rows.
        """
        assert batch.inner is not None
        config, drafter = self.config, self.drafter
        with self.autocast(batch.inner.device):
            drafted = self.unrolled(batch, drafter.fuse(batch.inner), progress)
        normed = drafter.norm(drafted.drafts)
        tokens = batch.input_ids[drafted.sequence, drafted.row + 2]
        head = FrozenHead(head_weight, head_bias, len(head_weight))
        scored = self._scored(drafted.features, tokens, head, generator)
        wanted = Wanted(drafted.features, drafted.valid, scored.tokens, drafted.before)
        losses = draft_losses(normed, wanted, scored.head, config.loss, config.head_chunk, scored.own)
        if not (config.train_head and (config.loss.divergence_weight or config.loss.top_k_weight)):
            total = losses.total + 0 * drafter.lm_head.weight.sum()  # every process must have a gradient
            losses = replace(losses, total=total)
        aligned = normed if config.aligned == "normed" else drafted.drafts
        outcome = self.outcome(losses, drafted, aligned, tokens, generator)
        return outcome._replace(sums={**outcome.sums, "covered": losses.covered})

    def _scored(self, goals: Tensor, tokens: Tensor, head: FrozenHead, generator: torch.Generator) -> _Scored:
        """All ids, or candidates for them, in the target's head and in the drafter's."""
        config, vocabulary, own_ids = self.config, len(head.weight), self.drafter.ids
        weight, sole = self.drafter.lm_head.weight, config.loss.renormalised
        weight = weight if config.train_head else weight.detach()
        ids, often = torch.arange(vocabulary, device=goals.device), None
        if 0 < config.loss.candidates < vocabulary:
            chunk = config.head_chunk or rows_at_a_time(vocabulary)
            chosen = candidates.choose(
                goals, tokens, head.weight, head.bias, config.loss.candidates, generator, chunk
            )
            ids, often = chosen.ids, chosen.often
            head = FrozenHead(chosen.weight, chosen.bias, chosen.certain)
        elif len(own_ids) == vocabulary:
            return _Scored(head, OwnHead(weight, None, vocabulary, sole), tokens)
        place = torch.full((vocabulary,), -1, device=goals.device)
        place[own_ids] = torch.arange(len(own_ids), device=goals.device)
        known = place[ids] >= 0
        order, certain = known.byte().argsort(descending=True, stable=True), int(known[: head.certain].sum())
        own = order[: int(known.sum())]
        own_head = OwnHead(weight[place[ids[own]]], None if often is None else often[own], certain, sole)
        bias = None if head.bias is None else head.bias[order]
        place[ids[order]] = torch.arange(len(order), device=goals.device)
        return _Scored(FrozenHead(head.weight[order], bias, head.certain), own_head, place[tokens])
