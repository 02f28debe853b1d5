"""Which models can be decoded losslessly, up to which length, and what ends their texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coral.errors import CoralError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Families whose logits are head(feature) with nothing in between, and whose only state is a KV cache. Each is
# compared with Hugging Face `generate` token for token in tests/test_parity.py.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma3_text")

_ALIKE = ("mistral", "phi3")  # all of whose layers have the window, whatever `layer_types` says
_WITHOUT_WINDOW = ("llama", "olmo2")  # whose code knows none, whatever the config says


def check_supported(config: PreTrainedConfig) -> None:
    """Raise CoralError with the reason when a model of this config cannot be decoded losslessly."""
    kind = config.model_type
    if kind not in SUPPORTED:
        raise CoralError(
            f"architecture {kind!r} is not supported: its logits, state or masks are not known to be exact "
            f"here; use a target of one of these families: {', '.join(SUPPORTED)}."
        )
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, key, None):
            raise CoralError(
                f"the model's config sets {key}, which changes its logits in a way that is not known to be "
                f"exact here; use a checkpoint without it, as those of {kind} are."
            )
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        raise CoralError(
            f"layers of type {', '.join(sorted(odd))} keep a state that cannot be cut to a path."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise CoralError(
            "quantised targets are not supported: their rounding depends on the number of rows, so output "
            "could not be compared with plain decoding; load the unquantised checkpoint."
        )


def context_length(config: PreTrainedConfig) -> int:
    """The longest sequence decoded exactly: it ends before rotary frequencies change with the length."""
    limit = int(config.max_position_embeddings)
    for rope in rotations(config).values():
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope":
            original = original or getattr(config, "original_max_position_embeddings", None)
        if rope.get("rope_type") in ("longrope", "dynamic"):
            limit = min(limit, int(original or limit))
    return limit


def rotations(config: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """The rotary parameters of each type of layers, or those of all of them under None."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope and all(isinstance(value, dict) for value in rope.values()):
        return dict(rope)
    return {None: rope}


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The sliding window of the layers that have one; None where none has."""
    known = config.model_type not in _WITHOUT_WINDOW and getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if known else None


def alike(config: PreTrainedConfig) -> bool:
    """Whether all layers have the window, or none."""
    return getattr(config, "layer_types", None) is None or config.model_type in _ALIKE


def windowed(config: PreTrainedConfig) -> list[bool]:
    """Which layers see no further back than the window."""
    if alike(config) or sliding_window(config) is None:
        return [sliding_window(config) is not None] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in config.layer_types]


def embedding_scale(config: PreTrainedConfig) -> float:
    """What a family multiplies the rows of its embedding by; the model itself rounds it to its dtype."""
    return float(config.hidden_size**0.5) if config.model_type == "gemma3_text" else 1.0


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """The ids that end a text, empty if none is named.

    Raises:
        CoralError: what is named is no token id.
    """
    generation = model.generation_config
    eos = generation.eos_token_id if generation is not None else None
    eos = model.config.eos_token_id if eos is None else eos
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    named = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    if odd := [each for each in named if type(each) is not int or each < 0]:
        raise CoralError(
            f"the model's eos_token_id holds {odd[0]!r}, which is no token id, so its texts would not end; "
            "correct it in generation_config.json or config.json."
        )
    return frozenset(named)
