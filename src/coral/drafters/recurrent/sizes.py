"""The sizes of a drafter that is Llama-shaped whatever its target's family, and how engines are told them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import torch
from pydantic import Field

from coral.drafters.recurrent.llama import ACTIVATIONS
from coral.errors import CoralError
from coral.json_file import Size
from coral.target.families import rotations

# Rotary types whose frequencies are the same at every length, so a cached key never goes out of date.
_FIXED_ROTARY = {"default", "linear", "llama3", "yarn"}


@dataclass(frozen=True)
class LlamaSizes:
    """The sizes that every kind has; `for_target` fills them in."""

    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    vocab_size: Size
    rms_norm_eps: Annotated[float, Field(ge=0, le=1)] = 1e-6
    hidden_act: str = "silu"
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    max_position_embeddings: Size = 2048

    def __post_init__(self) -> None:
        """Raises CoralError for options that make no drafter, whatever its weights."""
        heads, theta = self.num_attention_heads, self.rope_parameters.get("rope_theta")
        if heads % self.num_key_value_heads or self.head_dim % 2 or self.hidden_size % heads:
            raise CoralError(
                f"{heads} heads of {self.head_dim} with {self.num_key_value_heads} key/value heads make no "
                f"drafter of width {self.hidden_size}; heads come in equal groups, their size is even, and "
                "engines divide the width by their number."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise CoralError(f"hidden_act {self.hidden_act!r} is not known; use {', '.join(ACTIVATIONS)}.")
        rotary = self.rope_parameters.get("rope_type")
        known = isinstance(rotary, str) and rotary in _FIXED_ROTARY
        if not known or not isinstance(theta, int | float) or not 0 < theta < math.inf:
            raise CoralError(
                f"rope_type {rotary!r} with rope_theta {theta!r} is no rotary embedding of a drafter; use "
                f"{', '.join(sorted(_FIXED_ROTARY))}, and a number above 0."
            )

    def check_sizes(self, target: Any) -> None:
        """Raise CoralError unless the drafter reads and predicts what a target has."""
        for name in ("vocab_size", "hidden_size"):
            ours, theirs = getattr(self, name), getattr(target, name)
            if ours != theirs:
                raise CoralError(
                    f"the drafter's {name} is {ours}, but {target.name} has {theirs}; use a drafter that was "
                    "trained for this target."
                )

    @classmethod
    def for_target(cls, target_config: Any, **options: Any) -> Self:
        """A drafter of the target's own width, Llama-style whatever the target's family; `options` override.

        Rotary types that change with the length (dynamic, longrope) are replaced by the plain one with the
        same theta: the drafter is trained from scratch and needs no long-context correction of someone else's
        weights.
        """
        heads = target_config.num_attention_heads
        ropes = rotations(target_config)  # where layers differ: of those that see everything, as ours do
        rope = ropes[None] if None in ropes else ropes["full_attention"]
        rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
        if rope.get("rope_type", "default") not in _FIXED_ROTARY:
            rope = {"rope_theta": rope.get("rope_theta", 10000.0)}
        sizes = {
            "hidden_size": target_config.hidden_size,
            "intermediate_size": target_config.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(target_config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
            "vocab_size": target_config.vocab_size,
            "rms_norm_eps": getattr(target_config, "rms_norm_eps", 1e-6),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
            "max_position_embeddings": target_config.max_position_embeddings,
        }
        return cls(**{**sizes, **options})

    def for_engines(self, architecture: str, num_layers: int, dtype: torch.dtype) -> dict[str, Any]:
        """config.json as vLLM and SGLang read it, without what only one kind has.

        `bias` is the EAGLE code's word for fc's bias, which other engines read as attention bias: it is
        always false here.
        """
        rope = dict(self.rope_parameters)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        return {
            "architectures": [architecture],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": self.hidden_act,
            "rms_norm_eps": self.rms_norm_eps,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "tie_word_embeddings": False,
            "bias": False,
            "dtype": str(dtype).removeprefix("torch."),
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
