"""The metadata of a GGUF file -> a Hugging Face config. Every key of the architecture is used or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from coral.errors import CoralError
from coral.target.gguf.file import File
from coral.target.gguf.rope import decimal, read_rope

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
        values = _common(file, keys)
        rope = read_rope(keys, file, values.pop("rope_theta"), values["max_position_embeddings"])
        values |= {"rope_parameters": rope} | _of_family(file, keys, kind, values, rope)
    except KeyError as error:
        raise CoralError(f"{file.name} lacks {error}; use another file.") from error
    except (ValueError, TypeError) as error:
        raise CoralError(f"{file.name} describes its layers in a way unknown here: {error}.") from error
    if (width := values.pop("rotated")) != values["head_dim"]:
        raise CoralError(
            f"{file.name} rotates {width} of {values['head_dim']} dimensions, which {kind} has no config for."
        )
    if keys:
        raise CoralError(
            f"{file.name} says {file.architecture}.{', '.join(sorted(keys))}, which is not known for {kind} "
            "here, so its function may be another; use another file."
        )
    names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    return AutoConfig.for_model(kind, architectures=names, **values, **_token_ids(file))


def _common(file: File, keys: dict[str, Any]) -> dict[str, Any]:
    """What all families have, and `rope_theta` and `rotated`; taken out of `keys`."""
    values: dict[str, Any] = {ours: int(_one(keys.pop(key))) for key, ours in _KEYS.items()}
    vocab_size, hidden = file.tensors["token_embd.weight"].shape
    heads = values["num_attention_heads"]
    head_dim = int(keys.pop("attention.key_length", hidden // heads))
    usual = {"attention.value_length": head_dim, "vocab_size": vocab_size, "attention.causal": True}
    usual |= {"expert_count": 0, "expert_used_count": 0}
    for key, expected in usual.items():
        if (given := keys.pop(key, expected)) != expected:
            raise CoralError(
                f"{file.name} says {file.architecture}.{key} = {given}, where only {expected} is supported."
            )
    keys.pop("tensor_data_layout", None)  # of files that were made in 2023
    return values | {
        "num_key_value_heads": int(_one(keys.pop("attention.head_count_kv", heads))),
        "head_dim": head_dim,
        "rotated": int(keys.pop("rope.dimension_count", head_dim)),
        "rope_theta": decimal(keys.pop("rope.freq_base", 10000.0)),
        "rms_norm_eps": decimal(keys.pop("attention.layer_norm_rms_epsilon")),
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _of_family(
    file: File, keys: dict[str, Any], kind: str, values: dict[str, Any], rope: dict[str, Any]
) -> dict[str, Any]:
    """What one family has besides `values`, or otherwise."""
    match kind:
        case "llama":
            own = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
            return {key: name in file.tensors for key, name in own.items()}
        case "qwen2":
            return {"use_sliding_window": False}
        case "phi3":
            return _phi3(keys, values, rope)
        case "gemma3_text":
            return _gemma3(keys, values, rope)
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors}


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


def _phi3(keys: dict[str, Any], values: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    window, context = int(keys.pop("attention.sliding_window", 0)), values["max_position_embeddings"]
    own: dict[str, Any] = {"sliding_window": window if 0 < window < context else None}
    if (rotated := values["rotated"]) != values["head_dim"]:
        own["rope_parameters"] = rope | {"partial_rotary_factor": rotated / values["head_dim"]}
        own["rotated"] = values["head_dim"]
    if rope["rope_type"] == "longrope":
        own["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return own


def _gemma3(keys: dict[str, Any], values: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Windowed layers have a rotary base of their own, and no scaling."""
    count = values["num_hidden_layers"]
    pattern = keys.pop("attention.sliding_window_pattern", 6)
    windowed = pattern if np.ndim(pattern) else [(i + 1) % int(pattern) != 0 for i in range(count)]
    local = {"rope_theta": decimal(keys.pop("rope.freq_base_swa", 10000.0)), "rope_type": "default"}
    softcap = float(keys.pop("final_logit_softcapping", 0.0))
    of_27b = values["hidden_size"] // values["num_attention_heads"]  # as llama.cpp, by its 62 layers
    return {
        "sliding_window": int(keys.pop("attention.sliding_window")),
        "layer_types": ["sliding_attention" if local else "full_attention" for local in windowed],
        "final_logit_softcapping": softcap or None,
        "query_pre_attn_scalar": of_27b if count == 62 else values["head_dim"],
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
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


def _one(value: Any) -> Any:
    """A number that may be given for each layer, if it is the same for all."""
    if np.ndim(value) == 0:
        return value
    if len(set(np.asarray(value).tolist())) != 1:
        raise ValueError("a number that differs from layer to layer")
    return value[0]
