"""Features in one byte a number: float8_e4m3fn (4 bits of exponent, 3 of mantissa) with a scale per token.

The scale maps a token's largest number to the largest that the format holds, so tokens of any size keep the
same relative precision: 2^-4 at most for numbers within 2^-14 of the token's largest, less below.
"""

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max  # 448


def quantise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise [L,h] to float8; returned with the float32 scales [L] that multiply it."""
    features = features.float()
    scales = (features.abs().amax(-1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (features / scales[:, None]).to(DTYPE), scales


def restore(quantised: Tensor, scales: Tensor) -> Tensor:
    """Dequantise: float32 [L,h]."""
    return quantised.float() * scales[:, None]
