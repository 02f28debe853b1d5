"""One sampler with keyed noise: the token at a position is a fixed function of (prefix, seed, sequence id).

argmax over ids of  log p(id) + noise(seed, sequence id, position, id)  with Gumbel noise has the law p (the
Gumbel-max trick). The noise is a stateless integer hash, so it does not depend on device, batch order,
resumption or tree shape: accelerated output equals plain output token for token at any temperature.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from coral.device import has_queue, upload
from coral.errors import CoralError
from coral.native import sampler

_MASK64 = (1 << 64) - 1
LEAST_TEMPERATURE = 1e-30
"""Logits divided by a smaller one may leave float32's range; the text is that of 0 long before."""


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
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), Real):
                raise CoralError(f"{name} is {getattr(self, name)!r}, but it must be a number.")
        for name in ("top_k", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise CoralError(f"{name} is {getattr(self, name)!r}, but it must be a whole number.")
        if not 0 <= self.temperature <= sys.float_info.max:
            raise CoralError(f"temperature is {self.temperature}, but it must be 0 or more.")
        object.__setattr__(self, "temperature", float(self.temperature))  # whole numbers may be too long
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise CoralError(
                f"temperature is {self.temperature}, which float32 cannot divide by; use 0, which is greedy, "
                f"or at least {LEAST_TEMPERATURE}."
            )
        if self.top_k < 0:
            raise CoralError(f"top_k is {self.top_k}, but it must be 0 (off) or more.")
        if not 0 < self.top_p <= 1:
            raise CoralError(f"top_p is {self.top_p}, but it must be above 0 and at most 1.")
        if not 0 <= self.seed < 2**63:
            raise CoralError(f"seed is {self.seed}, but it must be from 0 to 2^63 - 1.")

    @property
    def filters(self) -> bool:
        """Whether some ids are never written, whatever the noise."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    def process(self, log_probs: Tensor) -> Tensor:
        """[N, K] logits or log-probabilities -> the same as float32 after temperature, top-k and top-p.

        Removed ids are -inf; rows are not renormalised. At temperature 0 only the cast is done.
        """
        log_probs = log_probs.float()
        if self.temperature == 0:
            return log_probs
        if self.temperature != 1:
            log_probs = log_probs / self.temperature
        if 0 < self.top_k < log_probs.shape[-1]:
            kth = log_probs.topk(self.top_k, dim=-1).values[..., -1:]
            log_probs = log_probs.masked_fill(log_probs < kth, -math.inf)
        if self.top_p < 1:
            size = log_probs.shape[-1]
            count = size if has_queue(log_probs.device) else min(_LIKELY, size)
            least = _crossing(log_probs, self.top_p, count)
            log_probs = log_probs.masked_fill(log_probs < least[:, None], -math.inf)
        return log_probs

    def scores(self, logits: Tensor, positions: Tensor, sequence_id: int | Sequence[int]) -> Tensor:
        """[N, V] target logits, [N] positions -> [N, V] float32; the argmax is the token at a position."""
        processed = self.process(logits)
        if self.temperature == 0:
            return processed
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return processed + self.noise(positions.to(logits.device), sequence_id, ids)

    def sample(self, logits: Tensor, positions: Tensor | None, sequence_id: int | Sequence[int]) -> Tensor:
        """[N, V] target logits, [N] positions -> [N] int64 tokens the target writes at these positions, which
        may be left out at temperature 0.

        The argmax of `scores`, of which on a CPU only the few that can be the largest are computed in full.
        """
        if self.temperature == 0:
            return sampler.argmax(logits)
        assert positions is not None
        if logits.shape[-1] <= _RIVALS or has_queue(logits.device):
            return self.scores(logits, positions, sequence_id).argmax(-1)
        processed = self.process(logits)
        many = [sequence_id] * len(logits) if isinstance(sequence_id, int) else sequence_id
        if (tokens := sampler.sample(processed, positions, [self.stream(i) for i in many])) is not None:
            return tokens
        ids = torch.arange(logits.shape[-1], device=logits.device)
        bits = self._bits(positions.to(logits.device), sequence_id, ids)
        values, rivals = (processed + _rough_gumbel(bits)).topk(_RIVALS, dim=-1)
        rivals = rivals.sort(dim=-1).values  # of equal scores the first wins, as in the argmax of all
        exact = processed.gather(-1, rivals) + _gumbel(bits.gather(-1, rivals))
        tokens = rivals.gather(-1, exact.argmax(-1, keepdim=True)).squeeze(-1)
        unsure = values[:, -1] >= values[:, 0] - 2 * _ROUGH
        if unsure.any():
            rest = (processed[unsure] + _gumbel(bits[unsure])).argmax(-1)
            tokens[unsure] = rest
        return tokens

    def noise(self, positions: Tensor, sequence_id: int | Sequence[int], ids: Tensor) -> Tensor:
        """Gumbel noise [N, K] float32 for positions [N] and ids [K] or [N, K]; one sequence id, or one a row.

        Computed in float64 and rounded to a grid of 2^-16, so that a device whose logarithm differs in the
        last bit still returns the same number.
        """
        return _gumbel(self._bits(positions, sequence_id, ids))

    def stream(self, sequence_id: int) -> int:
        """64 bits that a sequence's noise is made from."""
        return _splitmix(_splitmix(self.seed & _MASK64) ^ (sequence_id & _MASK64))

    def _halves(self, sequence_id: int) -> tuple[int, int]:
        """The stream as two signed integers of 32 bits, the lower first."""
        stream = self.stream(sequence_id)
        return _signed32(stream & 0xFFFFFFFF), _signed32(stream >> 32)

    def _bits(self, positions: Tensor, sequence_id: int | Sequence[int], ids: Tensor) -> Tensor:
        """24 random bits [N, K] int32."""
        low: int | Tensor
        high: int | Tensor
        if isinstance(sequence_id, int):
            low, high = self._halves(sequence_id)
        else:
            halves = torch.tensor([self._halves(i) for i in sequence_id], dtype=torch.int32)
            low, high = upload(halves, positions.device).unbind(-1)
        rows = _mix(_mix(positions.to(torch.int32) ^ low) ^ high)[:, None]
        return (_mix(_mix(ids.to(torch.int32) + 0x3C6EF372) ^ rows) >> 8) & 0xFFFFFF


_LIKELY = 64  # ids among which top-p usually ends, so that not all have to be sorted
_RIVALS = 8  # ids of each row whose noise is computed in full
_ROUGH = 0.1  # above the error of _rough_gumbel


def _crossing(log_probs: Tensor, top_p: float, count: int) -> Tensor:
    """The log-probability [N] of the id that crosses `top_p`, looked for among `count` likely ones first."""
    values = log_probs.topk(count, dim=-1).values
    probs = (values - log_probs.logsumexp(-1, keepdim=True)).exp()
    before = probs.cumsum(-1) - probs
    crossing = (before < top_p).sum(-1, keepdim=True) - 1  # float32 rounds the smallest top_p to 0: none
    least = values.gather(-1, crossing.clamp(min=0)).squeeze(-1)
    further = before[:, -1] + probs[:, -1] < top_p
    if count < log_probs.shape[-1] and further.any():
        least[further] = _crossing(log_probs[further], top_p, log_probs.shape[-1])
    return least


def _gumbel(bits: Tensor) -> Tensor:
    uniform = (bits.double() + 0.5) * 2.0**-24
    gumbel = uniform.log_().neg_().log_().neg_()
    return (gumbel.mul_(65536).round_().mul_(2.0**-16)).float()


def _rough_gumbel(bits: Tensor) -> Tensor:
    """The same in float32: from the distance to 1, which is small where the noise is large and then exact."""
    less = (bits - 0xFFFFFF).float().sub_(0.5).mul_(2.0**-24).clamp_(min=2.0**-24 - 1)
    return less.log1p_().neg_().log_().neg_()


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
