"""One sampler with keyed noise: the token at a position is a fixed function of (prefix, seed, sequence id).

argmax over ids of  log p(id) + noise(seed, sequence id, position, id)  with Gumbel noise has the law p (the
Gumbel-max trick). The noise is a stateless integer hash, so it does not depend on device, batch order,
resumption or tree shape: accelerated output equals plain output token for token at any temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coral.errors import CoralError

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """What the text is drawn from.

    temperature: 0 is greedy.
    top_k: keep the k likeliest ids; 0 keeps all.
    top_p: keep the smallest set of ids with at least this probability; 1 keeps all.
    seed: the same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise CoralError(f"temperature is {self.temperature}, but it must be 0 or more.")
        if self.top_k < 0:
            raise CoralError(f"top_k is {self.top_k}, but it must be 0 (off) or more.")
        if not 0 < self.top_p <= 1:
            raise CoralError(f"top_p is {self.top_p}, but it must be above 0 and at most 1.")

    def process(self, log_probs: Tensor) -> Tensor:
        """[N, K] logits or log-probabilities -> the same as float32 after temperature, top-k and top-p.

        Removed ids are -inf; rows are not renormalised. At temperature 0 only the cast is done.
        """
        log_probs = log_probs.float()
        if self.temperature == 0:
            return log_probs
        log_probs = log_probs / self.temperature
        if 0 < self.top_k < log_probs.shape[-1]:
            kth = log_probs.topk(self.top_k, dim=-1).values[..., -1:]
            log_probs = log_probs.masked_fill(log_probs < kth, -math.inf)
        if self.top_p < 1:
            ordered, ids = log_probs.sort(dim=-1, descending=True, stable=True)
            probs = ordered.softmax(-1)
            removed = probs.cumsum(-1) - probs >= self.top_p  # the id that crosses top_p stays
            log_probs = log_probs.masked_fill(removed.scatter(-1, ids, removed), -math.inf)
        return log_probs

    def scores(self, logits: Tensor, positions: Tensor, sequence_id: int | Sequence[int]) -> Tensor:
        """[N, V] target logits, [N] positions -> [N, V] float32; the argmax is the token at a position."""
        processed = self.process(logits)
        if self.temperature == 0:
            return processed
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return processed + self.noise(positions.to(logits.device), sequence_id, ids)

    def sample(self, logits: Tensor, positions: Tensor, sequence_id: int | Sequence[int]) -> Tensor:
        """[N, V] target logits, [N] positions -> [N] int64 tokens the target writes at these positions."""
        return self.scores(logits, positions, sequence_id).argmax(-1)

    def noise(self, positions: Tensor, sequence_id: int | Sequence[int], ids: Tensor) -> Tensor:
        """Gumbel noise [N, K] float32 for positions [N] and ids [K] or [N, K]; one sequence id, or one a row.

        Computed in float64 and rounded to a grid of 2^-16, so that a device whose logarithm differs in the
        last bit still returns the same number.
        """
        sequences = [sequence_id] if isinstance(sequence_id, int) else sequence_id
        streams = [_splitmix(_splitmix(self.seed & _MASK64) ^ (i & _MASK64)) for i in sequences]
        halves = [[_signed32(x & 0xFFFFFFFF), _signed32(x >> 32)] for x in streams]
        low, high = torch.tensor(halves, dtype=torch.int32, device=positions.device).unbind(-1)
        rows = _mix(_mix(positions.to(torch.int32) ^ low) ^ high)[:, None]
        bits = _mix(_mix(ids.to(torch.int32) + 0x3C6EF372) ^ rows)
        uniform = (((bits >> 8) & 0xFFFFFF).double() + 0.5) * 2.0**-24
        gumbel = uniform.log_().neg_().log_().neg_()
        return (gumbel.mul_(65536).round_().mul_(2.0**-16)).float()


def _splitmix(x: int) -> int:
    """One step of splitmix64 (Steele et al. 2014): a full-avalanche hash of a 64-bit integer."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _signed32(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def _mix(x: Tensor) -> Tensor:
    """Wellons' lowbias32 hash on int32 lanes; multiplication wraps, shifts are made logical by a mask."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x
