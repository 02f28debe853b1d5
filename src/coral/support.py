"""Which models can be decoded losslessly, up to which length, and what ends their texts."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from coral.errors import CoralError

# Families whose logits are head(feature) with nothing in between, and whose only state is a KV cache. Each is
# compared with Hugging Face `generate` token for token in tests/test_parity.py.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")


def check_supported(config: PreTrainedConfig) -> None:
    """Raise CoralError with the reason when a model of this config cannot be decoded losslessly."""
    kind = config.model_type
    if kind not in SUPPORTED:
        raise CoralError(
            f"architecture {kind!r} is not supported: its logits, state or masks are not known to be exact "
            f"here; use a target of one of these families: {', '.join(SUPPORTED)}."
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
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        return min(limit, int(original or limit))
    if rope.get("rope_type") == "dynamic":
        return min(limit, int(rope.get("original_max_position_embeddings") or limit))
    return limit


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """The ids that end a text, empty if none is named."""
    generation = model.generation_config
    eos = generation.eos_token_id if generation is not None else None
    eos = model.config.eos_token_id if eos is None else eos
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
