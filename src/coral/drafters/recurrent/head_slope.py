"""The gradient of a head that the drafter has of its own.

The slope of a row's losses in its D logits is outer * z - inner * p - k * (p on K), where only z, outer and
inner differ between draft steps (`losses.py`). So the terms with p wait until all steps of the rows are
there, and a step costs one product.
"""

import torch
from torch import Tensor


class HeadSlope:
    """Its sum over rows and draft steps.

    total: [D,h] float32.
    """

    def __init__(self, shape: torch.Size, top_k_weight: float, device: torch.device) -> None:
        self.total = torch.zeros(shape, device=device)
        self._top_k_weight = top_k_weight
        self._of_p: Tensor | float = 0.0
        self._of_top: Tensor | float = 0.0

    def add(self, drafts: Tensor, z: Tensor, outer: Tensor, inner: Tensor) -> None:
        """Draft features [c,h] of one step, times what they count."""
        self.total += _gathered(z, outer[:, None] * drafts)
        self._of_p = self._of_p + inner[:, None] * drafts
        self._of_top = self._of_top + drafts

    def end_rows(self, p: Tensor, ids: Tensor, top: Tensor) -> None:
        """All steps of some rows are there: the target's law p on them [c,D], and its K likeliest [c,K]."""
        assert isinstance(self._of_p, Tensor) and isinstance(self._of_top, Tensor)
        self.total -= _gathered(p, self._of_p)
        if self._top_k_weight:
            rows = top.unsqueeze(-1) * self._of_top.unsqueeze(1)  # [c,K,h]
            self.total.index_add_(0, ids.flatten(), rows.flatten(0, 1), alpha=-self._top_k_weight)
        self._of_p = self._of_top = 0.0


def _gathered(scores: Tensor, rows: Tensor) -> Tensor:
    """[c,D], [c,h] -> [D,h]."""
    return torch.mm(scores.t(), rows.to(scores.dtype)).float()
