"""llama.cpp, `--spec-type draft-eagle3`: one GGUF file of architecture `eagle3`, written with gguf-py alone.

What it wants otherwise than the EAGLE-3 directory has it: the two rows of a rotated pair of query and key
side by side, the target's ids themselves in `d2t`, and the target's tokenizer. The embedding is left out: it
takes the target's, however that is quantised.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize

from coral import __version__
from coral.drafters import checkpoint
from coral.drafters.eagle3.fused_network import FusedConfig, FusedDrafter
from coral.errors import CoralError
from coral.export import fused_layout
from coral.export.llama_cpp_target import ServedTarget
from coral.export.vllm import CHAIN
from coral.files import atomic_file
from coral.target.gguf.file import read
from coral.target.gguf.rope import LLAMA3, llama3_divisors

NAME = "llama.cpp"
ARCHITECTURE = "eagle3"
DTYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
"""By the name that --dtype takes: how matrices are stored; vectors are always float32."""
_STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f32"}
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_MARK = "coral.version"

_NAMES = {
    "fc": "fc",
    "norm": "output_norm",
    "lm_head": "output",
    "midlayer.input_layernorm": "blk.0.attn_norm",
    "midlayer.hidden_norm": "blk.0.attn_norm_2",
    "midlayer.self_attn.q_proj": "blk.0.attn_q",
    "midlayer.self_attn.k_proj": "blk.0.attn_k",
    "midlayer.self_attn.v_proj": "blk.0.attn_v",
    "midlayer.self_attn.o_proj": "blk.0.attn_output",
    "midlayer.post_attention_layernorm": "blk.0.ffn_norm",
    "midlayer.mlp.gate_proj": "blk.0.ffn_gate",
    "midlayer.mlp.up_proj": "blk.0.ffn_up",
    "midlayer.mlp.down_proj": "blk.0.ffn_down",
}

Array = np.ndarray[Any, np.dtype[Any]]


def lacks(ours: dict[str, Any]) -> list[str]:
    """What llama.cpp cannot carry of a drafter with this record (see `checkpoint.read_config`), in words."""
    if ours["kind"] != fused_layout.KIND:
        return [f"drafters of kind {ours['kind']!r} (only {fused_layout.KIND})"]
    config = checkpoint.config_of(ours)
    lacks, rotary = fused_layout.lacks_without_eagle_3_1(config), config.rope_parameters["rope_type"]
    if config.hidden_act != "silu":
        lacks.append(f"hidden_act {config.hidden_act!r} (only silu)")
    if rotary not in ("default", "llama3"):
        lacks.append(f"rotary type {rotary!r} (only default and llama3)")
    return lacks


def export(directory: Path, output: Path, target: ServedTarget, dtype: str = "auto") -> None:
    """Write the drafter in `directory` as the GGUF file `output`, in one step.

    Args:
        output: new, or an older export, which is replaced.
        dtype: of the matrices, see `DTYPES`; auto: as they are stored.

    Raises:
        CoralError: not a drafter of ours, or one for another target; what llama.cpp cannot carry or has no
            states of, which is named; numbers beyond float16; an output that is something else; a disk that
            refuses.
    """
    _refuse_foreign(output)
    ours = checkpoint.read_config(directory)
    if missing := lacks(ours):
        raise CoralError(
            f"{NAME} cannot carry {' and '.join(missing)}, and this drafter needs it; use another format, or "
            "train a drafter without."
        )
    target.check()
    drafter = checkpoint.load(directory)
    _check_target(drafter.config, target)
    dtype = _STORED[drafter.fc.weight.dtype] if dtype == "auto" else dtype
    found = tensors(drafter.float())
    with atomic_file(output) as aside:
        writer = GGUFWriter(aside, ARCHITECTURE)
        writer.add_file_type(_FILE_TYPES[dtype])
        for key, value in metadata(drafter.config, target).items():
            _add(writer, key, value)
        for name, values in found.items():
            packed, kind = _packed(name, values, DTYPES[dtype])
            writer.add_tensor(name, packed, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def tensors(drafter: FusedDrafter) -> dict[str, Array]:
    """The tensors by llama.cpp's names, weights in float32."""
    config, found = drafter.config, {}
    heads = {"blk.0.attn_q": config.num_attention_heads, "blk.0.attn_k": config.num_key_value_heads}
    for name, tensor in drafter.state_dict().items():
        if name in fused_layout.IDS:
            continue
        values, theirs = tensor.detach().cpu().numpy(), _NAMES[name.removesuffix(".weight")]
        if count := heads.get(theirs):
            values = interleaved(values, count)
        found[f"{theirs}.weight"] = np.ascontiguousarray(values)
    if config.draft_vocab_size < config.vocab_size:
        found["d2t"] = drafter.ids.cpu().numpy()
    if (rope := config.rope_parameters)["rope_type"] == "llama3":
        scaled = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
        original = rope["original_max_position_embeddings"]
        divisors = llama3_divisors(rope["rope_theta"], config.head_dim // 2, original, **scaled)
        found[LLAMA3] = divisors.astype(np.float32)
    return found


def interleaved(rows: Array, heads: int) -> Array:
    """Rows [n, ...] of heads with the two of a rotated pair half a head apart -> side by side."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def metadata(config: FusedConfig, target: ServedTarget) -> dict[str, Any]:
    """All keys but the architecture and the file's type."""
    own = {
        "block_count": 1,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
        "target_layers": [*config.layers],
        "target_hidden_size": config.hidden_size,
        "norm_before_residual": False,
        "norm_before_fc": False,
    }
    return {
        "general.name": f"EAGLE-3 drafter for {Path(target.name).name}",
        _MARK: __version__,
        **{f"{ARCHITECTURE}.{key}": value for key, value in own.items()},
        **target.keys,
    }


def command(output: Path, target: ServedTarget) -> str:
    """What serves the drafter; a target that is no GGUF file is converted first, with llama.cpp's script."""
    model = target.file or f"{Path(target.name).name}.gguf"
    served = ["llama-server", "-m", model, "-md", str(output)]
    drafting = ["--spec-type", "draft-eagle3", "--spec-draft-n-max", str(CHAIN)]
    convert = ["python", "convert_hf_to_gguf.py", target.name, "--outfile", model]
    lines = [] if target.file else [shlex.join(convert)]
    return "\n".join([*lines, shlex.join([*served, *drafting])])


def _refuse_foreign(output: Path) -> None:
    if output.suffix.lower() != ".gguf" or output.is_dir():
        raise CoralError(
            f"{NAME} reads one file; name it as --output, such as {output.with_suffix('.gguf')}."
        )
    if output.exists() and _MARK not in read([output]).metadata:
        raise CoralError(f"{output} is a file that is not an export; choose another name.")


def _check_target(config: FusedConfig, target: ServedTarget) -> None:
    for name in ("vocab_size", "hidden_size"):
        own, theirs = getattr(config, name), getattr(target, name)
        if own != theirs:
            raise CoralError(
                f"the drafter's {name} is {own}, but {target.name} has {theirs}; name the target that it was "
                "trained for."
            )
    if max(config.layers) >= target.num_layers:
        raise CoralError(
            f"the drafter reads what enters the layers {[*config.layers]}, but {target.name} has "
            f"{target.num_layers}; name the target that it was trained for."
        )


def _packed(name: str, values: Array, kind: Type) -> tuple[Array, Type | None]:
    """A tensor as it is stored: rows that are no whole blocks go as bfloat16; None: as numpy has them."""
    if values.ndim == 1 or kind == Type.F32:
        return values, None
    if kind == Type.F16:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise CoralError(f"{name} holds numbers beyond float16; use --dtype bf16 or f32.")
        return half, None
    kind = kind if values.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Type.BF16
    return quantize(values, kind), kind


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key in the type that its value asks for, as llama.cpp's converter writes them."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        if value:  # of no length, there is no type either
            writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_key_value(key, value, GGUFValueType.UINT32 if value >= 0 else GGUFValueType.INT32)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))
