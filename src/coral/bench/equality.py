"""Is accelerated output the plain output? Each sequence is equal, near_tie or wrong.

In float32 any difference is wrong. In bfloat16 and float16 a forward over several rows rounds differently
from one over a single row and can flip a near tie; the first divergence is forgiven if rounding explains it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from coral.decoding.sampling import Sampling
from coral.target.target import Target

Verdict = Literal["equal", "near_tie", "wrong"]
Logits = Callable[[list[int]], Tensor]
"""The logits [V] that follow a prefix."""


def verdict_of(
    prompt: Sequence[int],
    plain: Sequence[int],
    other: Sequence[int],
    sampling: Sampling,
    sequence_id: int,
    references: tuple[Logits, Logits] | None,
) -> Verdict:
    """The verdict on two outputs of one prompt: they are compared up to their first divergence.

    Args:
        plain, other: tokens written by plain and by accelerated decoding.
        references: see `references`.
    """
    if list(plain) == list(other):
        return "equal"
    first = next((i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b), None)
    if first is None or references is None:  # first is None: one output is longer than the other
        return "wrong"
    rounded, exact = references
    prefix = [*prompt, *plain[:first]]
    tie = is_near_tie(
        rounded(prefix), exact(prefix), (plain[first], other[first]), sampling, len(prefix), sequence_id
    )
    return "near_tie" if tie else "wrong"


def references(target: Target, exact: torch.dtype = torch.float32) -> tuple[Logits, Logits] | None:
    """Logits after a prefix in the run's own dtype and in `exact`; None if they are one: nothing is forgiven.

    Another engine rounds float32 in its own way: judge its texts with torch.float64. The copy of the model in
    `exact` is made when the first texts differ.
    """
    if target.dtype == exact:
        return None
    model: Any = target.model
    return _last_row(lambda: model), _last_row(cache(lambda: copy.deepcopy(model).to(exact)))


def _last_row(model: Callable[[], Any]) -> Logits:
    @torch.inference_mode()
    def logits(prefix: list[int]) -> Tensor:
        owner = model()
        ids = torch.tensor([prefix], device=owner.device)
        return owner(ids, use_cache=False, logits_to_keep=1).logits[0, -1].double()

    return logits


def is_near_tie(
    rounded: Tensor,
    exact: Tensor,
    tokens: tuple[int, int],
    sampling: Sampling,
    position: int,
    sequence_id: int,
) -> bool:
    """Whether rounding explains that two runs wrote different tokens here.

    With d the largest |rounded - exact| log-probability after temperature, two scores can trade places only
    if they are less than 2 d apart. So each token must be one that some rounding of this size could have
    written: not surely removed by top-k or top-p, and not beaten by more than 2 d by a surely kept id. Two
    tokens far from every edge then differ by less than 2 d themselves.

    Args:
        rounded, exact: logits [V] after the same prefix, in the dtype of the run and in float32.
        position: of the token to be written; sequence_id: both select the keyed noise.
    """
    temperature = sampling.temperature or 1.0
    scores = (exact.double() / temperature).log_softmax(-1)
    slack = 2 * float((scores - (rounded.double() / temperature).log_softmax(-1)).abs().max())
    if math.isnan(slack):
        return False
    surely_kept, perhaps_kept = _kept(scores, slack, sampling)
    if sampling.temperature > 0:
        ids = torch.arange(len(scores), device=scores.device)
        at = torch.tensor([position], device=scores.device)
        scores = scores + sampling.noise(at, sequence_id, ids)[0].double()
    best = float(scores[surely_kept].max()) if surely_kept.any() else -math.inf
    return all(bool(perhaps_kept[token]) and float(scores[token]) > best - slack for token in tokens)


def _kept(log_probs: Tensor, slack: float, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Masks [V]: ids that top-k and top-p keep under any rounding of this size, and under some rounding."""
    surely = torch.ones_like(log_probs, dtype=torch.bool)
    perhaps = surely.clone()
    if sampling.temperature == 0:
        return surely, perhaps
    ordered = log_probs.sort(descending=True).values
    k = sampling.top_k or len(ordered)
    if k < len(ordered):
        surely &= log_probs > ordered[k] + slack
        perhaps &= log_probs >= ordered[k - 1] - slack
        ordered = ordered[:k]
    if sampling.top_p < 1:
        mass = ordered.softmax(-1).cumsum(-1) - ordered.softmax(
            -1
        )  # what lies before each id, likeliest first
        fewest = int((mass < sampling.top_p * math.exp(-slack)).sum())
        most = int((mass < sampling.top_p * math.exp(slack)).sum())
        if fewest < len(ordered):
            surely &= log_probs > ordered[fewest] + slack
        perhaps &= log_probs >= ordered[most - 1] - slack
    return surely, perhaps
