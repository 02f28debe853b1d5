"""Log-probabilities of a text's tokens, read off the logits with which the target decides on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """A token and what the target gives it: its log-softmax, before temperature, top-k, top-p and masks.

    likeliest: id and log-probability of the likeliest tokens there, the best first.
    """

    token: int
    log_prob: float
    likeliest: tuple[tuple[int, float], ...] = ()


class LogProbs:
    """Notes them for one text, as it is read and written.

    Args:
        top: how many of the likeliest are noted beside each token.
        prompt: whether the prompt's tokens are scored too. The first has no log-probability.
    """

    def __init__(self, top: int = 0, prompt: bool = False) -> None:
        self.top, self.prompt = top, prompt
        self._new: list[Scored] = []

    def note(self, logits: Tensor, tokens: Sequence[int]) -> None:
        """logits: [n, V], of the rows behind which the `tokens` [n] stand."""
        logits = logits.float()
        chosen = logits.new_tensor(tokens, dtype=torch.int64)[:, None]
        values, ids = logits.topk(min(self.top, logits.shape[-1]), dim=-1)
        total = logits.logsumexp(-1, keepdim=True)
        parts = (logits.gather(-1, chosen) - total)[:, 0], values - total, ids
        for token, log_prob, best, names in zip(tokens, *(part.tolist() for part in parts), strict=True):
            self._new.append(Scored(token, log_prob, tuple(zip(names, best, strict=True))))

    def take(self) -> list[Scored]:
        """What was noted since this was last asked."""
        taken, self._new = self._new, []
        return taken
