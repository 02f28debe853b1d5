"""Tiny GGUF files, written with gguf-py: tensors as llama.cpp's converter lays them out, a vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

HARD = json.loads((Path(__file__).parent / "gguf_ids.json").read_text(encoding="utf-8"))
"""Texts that tokenizers get wrong, conversations, and what llama.cpp makes of them; see its "made_by"."""

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def byte_level(pre: str, texts: list[str] = HARD["texts"]) -> dict[str, Any]:
    """A vocabulary of all bytes and all pairs of bytes in `texts`: wherever a text is cut, ids change."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "<|eot_id|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pairs: dict[str, None] = {}
    for text in texts:
        for word, _ in spell.pre_tokenize_str(text):
            pairs |= dict.fromkeys(f"{a} {b}" for a, b in pairwise(word))
    tokens = [*control, "<think>", *alphabet, *(pair.replace(" ", "", 1) for pair in pairs)]
    kinds = [3] * len(control) + [4] + [1] * (len(tokens) - len(control) - 1)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": list(pairs),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def sentencepiece(texts: list[str] = HARD["texts"]) -> dict[str, Any]:
    """As in Llama 2: bytes, characters and pairs of characters with scores, all different."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "  "]
    kinds = [2, 3, 3, *[6] * 256, 4]
    spelled = [text.replace(" ", "▁") for text in texts if text.isascii()]
    pairs = dict.fromkeys(a + b for text in spelled for a, b in zip("▁" + text, text, strict=False))
    characters = dict.fromkeys("".join(spelled))
    pieces = [piece for piece in [*pairs, *characters] if "\n" not in piece and "\x00" not in piece]
    scores = [0.0] * len(tokens) + [float(-i) for i in range(len(pieces))]
    kinds += [1] * len(pieces)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"model": "llama", "tokens": [*tokens, *pieces], "token_type": kinds, "scores": scores, **ids}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Mapping[str, Any] | None = None,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    quantised: str | None = None,
    template: str | None = None,
    architecture: str | None = None,
) -> Path:
    """Write `model` as llama.cpp's converter would.

    Args:
        tokenizer: keys under tokenizer.ggml; None: 'smollm' bytes and pairs, as many as the model has ids.
        keys: more metadata, or other (None: left out); a name that begins with a dot is the architecture's.
        tensors: more tensors, or None for those that are left out.
        quantised: the type of matrices whose rows are whole blocks; others are F32.
    """
    config = model.config
    arch = architecture or ARCHITECTURES.get(config.model_type, config.model_type)
    rope = config.rope_parameters
    theta = rope.get("full_attention", rope)["rope_theta"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    given: dict[str, Any] = {
        ".block_count": config.num_hidden_layers,
        ".context_length": config.max_position_embeddings,
        ".embedding_length": config.hidden_size,
        ".feed_forward_length": config.intermediate_size,
        ".attention.head_count": config.num_attention_heads,
        ".attention.head_count_kv": config.num_key_value_heads,
        ".attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        ".attention.key_length": head_dim,
        ".attention.value_length": head_dim,
        ".rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        ".rope.freq_base": float(theta),
    }
    vocabulary = dict(byte_level("smollm", [])) if tokenizer is None else dict(tokenizer)
    if tokenizer is None:
        cut = config.vocab_size  # what lies beyond is lost, as nobody writes texts with it
        vocabulary |= {name: vocabulary[name][:cut] for name in ("tokens", "token_type")}
    given |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    given |= {} if template is None else {"tokenizer.chat_template": template}
    given |= keys or {}
    writer = GGUFWriter(path, arch)
    for key, value in given.items():
        if value is not None:
            _add(writer, arch + key if key.startswith(".") else key, value)
    for name, values in {**laid_out(model, arch), **(tensors or {})}.items():
        if values is None:
            continue
        kind = GGMLQuantizationType[quantised or "F32"]
        if quantised and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def laid_out(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    """The parameters by the names of the tensors that they become, in float32."""
    config = model.config
    found = {}
    for name, parameter in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        values = parameter.detach().to(torch.float32).numpy()
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            theirs = _NAMES[part]
            if part == "post_attention_layernorm" and arch in ("olmo2", "gemma3"):
                theirs = "post_attention_norm"
            theirs = f"blk.{layer}.{theirs}"
            if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
                rest = values.shape[1:]
                halves = values.reshape(heads, 2, len(values) // heads // 2, *rest)
                values = halves.swapaxes(1, 2).reshape(-1, *rest)
        else:
            theirs = _NAMES[stem]
        if arch == "gemma3" and "norm" in theirs:
            values = values + 1
        found[f"{theirs}.{kind}"] = np.ascontiguousarray(values)
    return found


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(key)
