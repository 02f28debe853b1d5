"""The metadata of a GGUF file -> a Hugging Face config. Every key of the architecture is used or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from coral.errors import CoralError
from coral.gguf.file import File
from coral.gguf.rope import decimal, read_rope

FAMILIES = {
    "llama": "llama",  # Mistral, too: the same function, and the file names no window
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gemma3": "gemma3_text",
}
"""GGUF architecture -> Hugging Face model type."""

_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
# Control tokens that end a text whatever the metadata say; files name only one of a model's.
_ENDS = {
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "</s>", "<eos>",
    "<end_of_turn>", "<EOT>", "<\uff5cend▁of▁sentence\uff5c>",
}  # fmt: skip
_CONTROL = 3


def read_config(file: File) -> PreTrainedConfig:
    """The config of the model in `file`, without a dtype.

    Raises:
        CoralError: it is no text decoder of a known architecture, or says something that its Hugging Face
            class cannot do; the key is named.
    """
    _refuse_other_things(file)
    keys = file.keys()
    kind = FAMILIES[file.architecture]
    try:
        values: dict[str, Any] = {ours: int(_one(keys.pop(key))) for key, ours in _KEYS.items()}
        values["rms_norm_eps"] = decimal(keys.pop("attention.layer_norm_rms_epsilon"))
        vocab_size, hidden = file.tensors["token_embd.weight"].shape
    except (KeyError, ValueError, TypeError) as error:
        raise CoralError(f"{file.name} lacks {error}, or holds no number there; use another file.") from error
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = int(_one(keys.pop("attention.head_count_kv", heads)))
    head_dim = int(keys.pop("attention.key_length", hidden // heads))
    width = int(keys.pop("rope.dimension_count", head_dim))
    for key, usual in (("attention.value_length", head_dim), ("vocab_size", vocab_size)):
        _expect(file, keys, key, usual)
    values |= {"head_dim": head_dim, "vocab_size": vocab_size, "use_cache": True}
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    theta = decimal(keys.pop("rope.freq_base", 10000.0))
    rope = read_rope(keys, file, theta, values["max_position_embeddings"])
    match kind:
        case "llama" | "qwen3" | "olmo2":
            values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
            if kind == "llama":
                values["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
        case "qwen2":
            values["use_sliding_window"] = False
        case "phi3":
            window = int(keys.pop("attention.sliding_window", 0))
            values["sliding_window"] = window if 0 < window < values["max_position_embeddings"] else None
            if width != head_dim:
                rope["partial_rotary_factor"] = width / head_dim
                width = head_dim
            if rope["rope_type"] == "longrope":
                values["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        case "gemma3_text":
            values |= _gemma3(keys, values["num_hidden_layers"])
            scale = hidden // heads if values["num_hidden_layers"] == 62 else head_dim  # of 27B: its own
            values["query_pre_attn_scalar"] = scale
            local = {"rope_theta": decimal(keys.pop("rope.freq_base_swa", 10000.0)), "rope_type": "default"}
            rope = {"full_attention": rope, "sliding_attention": local}
    if width != head_dim:
        raise CoralError(
            f"{file.name} rotates {width} of {head_dim} dimensions, which {kind} has no config for; refused."
        )
    _expect(file, keys, "attention.causal", True)
    for key in ("expert_count", "expert_used_count"):
        _expect(file, keys, key, 0)
    keys.pop("tensor_data_layout", None)
    if keys:
        raise CoralError(
            f"{file.name} says {file.architecture}.{', '.join(sorted(keys))}, which is not known for {kind} "
            "here, so its function may be another; use another file."
        )
    names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    values |= {"rope_parameters": rope, "architectures": names, **_token_ids(file)}
    return AutoConfig.for_model(kind, **values)


def read_generation(file: File) -> GenerationConfig:
    """Which ids begin, end and pad a text: all that end one, not the first alone."""
    return GenerationConfig(**_token_ids(file))


def end_ids(file: File) -> list[int]:
    """The ids that end a text, that of `eos_token_id` first."""
    named = (file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    types = file.metadata.get("tokenizer.ggml.token_type", ())
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    known = [
        i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and token in _ENDS
    ]
    return list(dict.fromkeys([*(int(i) for i in named if i is not None and i < len(tokens)), *known]))


def _token_ids(file: File) -> dict[str, Any]:
    ends = end_ids(file)
    ids: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    for ours, theirs in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        given = file.metadata.get(f"tokenizer.ggml.{theirs}")
        ids[ours] = None if given is None else int(given)
    return ids


def _gemma3(keys: dict[str, Any], num_layers: int) -> dict[str, Any]:
    pattern = keys.pop("attention.sliding_window_pattern", 6)
    windowed = pattern if np.ndim(pattern) else [(i + 1) % int(pattern) != 0 for i in range(num_layers)]
    kinds = ["sliding_attention" if local else "full_attention" for local in windowed]
    softcap = keys.pop("final_logit_softcapping", None)
    return {
        "sliding_window": int(keys.pop("attention.sliding_window", 0)),
        "layer_types": kinds,
        "final_logit_softcapping": None if not softcap else float(softcap),
    }


def _refuse_other_things(file: File) -> None:
    kind = str(file.metadata.get("general.type", "model"))
    if kind != "model" or file.architecture == "clip":
        what = {"adapter": "a LoRA adapter", "mmproj": "an image encoder"}.get(kind, f"of type {kind!r}")
        raise CoralError(
            f"{file.name} is no language model: it is {what}; name the file of the model itself."
        )
    if file.architecture not in FAMILIES:
        raise CoralError(
            f"{file.name} has the architecture {file.architecture!r}, which is not supported as GGUF; these "
            f"are: {', '.join(FAMILIES)}."
        )


def _expect(file: File, keys: dict[str, Any], key: str, usual: Any) -> None:
    if (given := keys.pop(key, usual)) != usual:
        raise CoralError(
            f"{file.name} says {file.architecture}.{key} = {given}, where only {usual} is supported; refused."
        )


def _one(value: Any) -> Any:
    """A number that may be given for each layer, if it is the same for all."""
    if np.ndim(value) == 0:
        return value
    if len(set(np.asarray(value).tolist())) != 1:
        raise ValueError("layers of one kind")
    return value[0]
