"""Rotary position embedding: what a GGUF file says of it -> `rope_parameters` of a Hugging Face config.

llama.cpp keeps Llama 3's scaling as a tensor of one divisor for each frequency, LongRoPE's as two, and yarn's
and linear scaling as keys. transformers' own reading of GGUF files drops all of these.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coral.errors import CoralError
from coral.target.gguf.file import File

Numbers = np.ndarray[Any, np.dtype[np.float64]]
LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (LLAMA3, LONG, SHORT)
_TOLERANCE = 1e-5  # relative; divisors are stored in float32


def read_rope(keys: dict[str, Any], file: File, theta: float, context: int) -> dict[str, Any]:
    """`rope_parameters`, of the layers that scaling applies to; what is used is taken out of `keys`.

    Args:
        theta: the rotary base.
        context: the longest position, `max_position_embeddings`.

    Raises:
        CoralError: a scaling that Hugging Face has no parameters for.
    """
    scaling = {key: keys.pop(f"rope.scaling.{key}") for key in _SCALING if f"rope.scaling.{key}" in keys}
    old = keys.pop("rope.scale_linear", None)
    factor = float(scaling.get("factor") or old or 1.0)
    kind = scaling.get("type", "linear")  # what llama.cpp takes it for where the key is absent
    original = int(scaling.get("original_context_length") or 0)
    attention = scaling.get("attn_factor")
    plain: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    given = [name for name in TENSORS if name in file.tensors]
    if LONG in given or SHORT in given:
        return plain | _longrope(file, original, attention)
    if odd := [key for key, usual in _USUAL.items() if float(scaling.get(key, usual)) != usual]:
        raise CoralError(f"{file.name} scales RoPE with {_key(file, odd[0])}, which has no counterpart here.")
    if given and (kind == "yarn" or factor != 1.0):
        raise CoralError(f"{file.name} scales RoPE twice, by {LLAMA3} and by {_key(file, 'type')}: refused.")
    if given:
        return plain | _llama3(file, theta, original)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return plain
    if kind == "linear":
        return plain | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        betas = {key: float(scaling[f"yarn_{key}"]) for key in _BETAS if f"yarn_{key}" in scaling}
        length = {"original_max_position_embeddings": original or context}
        return plain | {"rope_type": "yarn", "factor": factor} | length | betas
    raise CoralError(f"{file.name} scales RoPE as {kind!r} ({_key(file, 'type')}), which is not known here.")


_BETAS = ("beta_fast", "beta_slow")
_USUAL = {"attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}
_SCALING = (
    "type",
    "factor",
    "original_context_length",
    "finetuned",
    "yarn_beta_fast",
    "yarn_beta_slow",
    *_USUAL,
)


def _key(file: File, name: str) -> str:
    return f"{file.architecture}.rope.scaling.{name}"


def _divisors(file: File, name: str) -> Numbers:
    return file.tensors[name].packed().view("<f4").ravel().astype(np.float64)


def _longrope(file: File, original: int, attention: float | None) -> dict[str, Any]:
    if not original or LONG not in file.tensors or SHORT not in file.tensors:
        raise CoralError(
            f"{file.name} scales RoPE by {LONG} or {SHORT} without the other, or without "
            f"{_key(file, 'original_context_length')}; use a file converted by a newer llama.cpp."
        )
    return {
        "rope_type": "longrope",
        "long_factor": [decimal(x) for x in _divisors(file, LONG)],
        "short_factor": [decimal(x) for x in _divisors(file, SHORT)],
        "original_max_position_embeddings": original,
    } | ({} if attention is None else {"attention_factor": float(attention)})


def _llama3(file: File, theta: float, original: int) -> dict[str, Any]:
    """Llama 3's parameters from its divisors.

    Between two wavelengths the divisor of a frequency is 1 / ((1 - s) / factor + s), where s is linear in the
    frequency: slope original / (high - low), intercept -low / (high - low). Only these two are determined, so
    the original length is the file's, or Llama 3's.
    """
    divisors, original = _divisors(file, LLAMA3), original or 8192
    if np.abs(divisors - 1).max() < _TOLERANCE:
        return {}
    largest = divisors.max()
    for factor in (float(f"{largest:.5g}"), decimal(largest)):
        if factor > 1 and (found := _fit(divisors, theta, original, factor)):
            return {"rope_type": "llama3", **found, "original_max_position_embeddings": original}
    raise CoralError(
        f"{file.name} scales RoPE by {LLAMA3} with divisors from {divisors.min():g} to {largest:g} that are "
        "Llama 3's for no parameters, so positions cannot be computed as the model does; use another file."
    )


def _fit(divisors: Numbers, theta: float, original: int, factor: float) -> dict[str, float] | None:
    """The two frequency factors with which Llama 3's scaling by `factor` gives these divisors, if any."""
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > _TOLERANCE) & (smooth < 1 - _TOLERANCE)
    guesses = [(1.0, 4.0)]  # Llama 3's own
    if between.sum() > 1:
        periods = original * _frequencies(theta, len(divisors))
        slope, intercept = np.polyfit(periods[between], smooth[between], 1)
        low, high = -intercept / slope, (1 - intercept) / slope
        guesses += [(float(f"{low:.5g}"), float(f"{high:.5g}")), (float(low), float(high))]
    for low, high in guesses:
        found = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        expected = llama3_divisors(theta, len(divisors), original, **found)
        if np.abs(expected / divisors - 1).max() < _TOLERANCE:
            return found
    return None


def llama3_divisors(
    theta: float, count: int, original: int, factor: float, low_freq_factor: float, high_freq_factor: float
) -> Numbers:
    """What Llama 3's scaling divides each of `count` frequencies by, as Hugging Face computes it."""
    periods = original * _frequencies(theta, count)
    smooth = (periods - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _frequencies(theta: float, count: int) -> Numbers:
    """How often each pair of dimensions turns round at a step."""
    return np.asarray(theta ** (-np.arange(count) / count) / (2 * np.pi))


def decimal(value: float) -> float:
    """The shortest decimal that is this float32: files store 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))
