"""The tensors of a GGUF file -> one model.safetensors, a few rows at a time.

Memory stays that of a few rows in float32, or of one packed tensor whose rows are put in another order. In
float32 values are gguf-py's own; other dtypes round them.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import dequantize
from gguf.quants import QuantError
from torch import Tensor as TorchTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from coral.errors import CoralError
from coral.target.gguf.blocks import in_order
from coral.target.gguf.file import File, Tensor
from coral.target.gguf.rope import TENSORS as ROPE

_CHUNK = 1 << 22  # values that are dequantised together
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OTHERWISE = {"phi3": {"ffn_up": "mlp.gate_up_proj"}, "gemma3": {"ffn_norm": "pre_feedforward_layernorm"}}


def place(file: File, config: PreTrainedConfig) -> dict[str, Tensor]:
    """The tensors of `file` by the names of the parameters that they are.

    Raises:
        CoralError: one of them has no place in the model, or one of the model's is missing or of another
            shape; they are named.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    inside = _INSIDE | _OTHERWISE.get(file.architecture, {})
    placed: dict[str, Tensor] = {}
    foreign = []
    for name, tensor in file.tensors.items():
        if name in ROPE:
            continue  # part of the config
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        part = _OUTSIDE.get(stem) if block is None else inside.get(block[2])
        ours = f"{part}.{kind}" if block is None else f"model.layers.{block[1]}.{part}.{kind}"
        if part is None or ours not in wanted or ours in placed:
            foreign.append(name)
        else:
            placed[ours] = tensor
    if foreign:
        raise CoralError(
            f"{file.name} holds tensors without a place in a {config.model_type} model: {_few(foreign)}; its "
            "function may be another, so it is refused."
        )
    if missing := [name for name in wanted if name not in placed]:
        raise CoralError(
            f"{file.name} lacks tensors of a {config.model_type} model: {_few(missing)}; use another file."
        )
    for name, shape in wanted.items():
        if placed[name].shape != shape:
            raise CoralError(
                f"{file.name}: {name} has shape {placed[name].shape}, but the model that the file describes "
                f"has {shape}; use another file."
            )
    return placed


def write_weights(
    file: File,
    placed: dict[str, Tensor],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    path: Path,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write `placed` in this dtype to the safetensors file `path`, calling `advance` for each tensor.

    Raises:
        CoralError: a quantisation that gguf-py does not dequantise, or values that the dtype cannot hold.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in placed.items():
        end = begin + tensor.rows * tensor.shape[-1] * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in placed.items():
            for values in _values(file, name, tensor, config):
                stored = values.to(dtype)
                if dtype == torch.float16 and not stored.isfinite().all():
                    raise CoralError(
                        f"{file.name}: {name} holds values beyond float16; use bfloat16 or float32."
                    )
                stored.view(torch.uint8).numpy().tofile(out)
            advance()


def _values(file: File, name: str, tensor: Tensor, config: PreTrainedConfig) -> Iterator[TorchTensor]:
    """The tensor as the model has it, in float32, in pieces of whole rows."""
    heads = interleaved_heads(file, name, config)
    # Of a bias, a row is one value.
    whole = in_order(tensor.packed().reshape(tensor.shape[0], -1), heads) if heads else None
    count, step = tensor.rows if whole is None else len(whole), max(1, _CHUNK // tensor.shape[-1])
    for start in range(0, count, step):
        stop = min(start + step, count)
        packed = tensor.packed(start, stop) if whole is None else whole[start:stop]
        try:
            values = np.ascontiguousarray(dequantize(packed, tensor.type), dtype=np.float32)
        except (NotImplementedError, QuantError) as error:
            raise CoralError(
                f"{file.name} stores {name} as {tensor.type.name}, which gguf-py cannot dequantise; use "
                "another quantisation, Q8_0 or Q4_K_M for example."
            ) from error
        # Gemma's norms multiply by 1 + weight, and files hold the sum.
        yield torch.from_numpy(values - 1 if file.architecture == "gemma3" and "norm" in name else values)


def interleaved_heads(file: File, name: str, config: PreTrainedConfig) -> int:
    """In how many heads of a matrix or bias the two rows of a rotated pair are neighbours: files of Llama
    hold those of query and key so, where Hugging Face has them half a head apart. 0: the rows are in order.
    """
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    part = name.split(".")[-2]
    if file.architecture != "llama" or part not in heads:
        return 0
    return int(getattr(config, heads[part]))


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
