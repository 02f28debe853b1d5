"""A drafter's directory as others publish it: what lies in it, and what of it is believed.

EAGLE, EAGLE-2, EAGLE-3 and HASS publish config.json beside model.safetensors or pytorch_model.bin, or their
parts with an index. Tensors decide the sizes. config.json is believed only for what tensors cannot tell: the
number of heads, the rotary frequencies, the norm's epsilon and the activation.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor

from coral import json_file
from coral.errors import CoralError
from coral.files import POINTER, is_pointer, unreadable
from coral.target.record import TargetLike

# Rotary types whose frequencies do not depend on max_position_embeddings, which is set to the
# target's. Yarn's do unless the length that is stretched is given.
_ROTARY = ("default", "linear", "llama3", "yarn")


class EagleTarget(TargetLike, Protocol):
    """The target that an EAGLE directory, which records none, is compared with."""

    @property
    def config(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    def embed(self, ids: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    """A directory as it was found: the file of tensors, those by their names without prefix, config.json."""

    file: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def config_file(self) -> Path:
        return self.file.with_name("config.json")


def open_(directory: Path) -> Stored:
    """What a directory holds. The prefixes `model.` and `module.` are taken off the tensors' names.

    Raises:
        CoralError: a file that is missing or cannot be read, a tensor that is there twice.
    """
    file = next((f for f in map(directory.joinpath, _FILES) if f.is_file()), None)
    if file is None or not (directory / "config.json").is_file():
        raise CoralError(
            f"{directory} holds no drafter: neither one of ours (coral/config.json) nor config.json with "
            f"{' or '.join(_READERS)}; check the path."
        )
    stored: dict[str, Any] = {}
    for part in _parts(file):
        stored |= _read_file(part)
    return Stored(file, _named(file, stored), _read_config(directory / "config.json"))


_READERS: dict[str, Any] = {
    "model.safetensors": load_file,
    "pytorch_model.bin": lambda file: torch.load(file, map_location="cpu", weights_only=True),
}


_INDEX = ".index.json"
_FILES = [*_READERS, *(name + _INDEX for name in _READERS)]
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tensors that follow from config.json."""
_IDS = ("d2t", "t2d")
"""Tensors that are no weights: the draft vocabulary of EAGLE-3."""


def _parts(file: Path) -> list[Path]:
    """The files of tensors that `file` is, or is the index of."""
    if not file.name.endswith(_INDEX):
        return [file]
    again = "copy the drafter again."
    index: dict[str, Any] = json_file.read(file, dict, again)
    names = {*json_file.check(index.get("weight_map"), dict[str, str], f"{file}: weight_map", again).values()}
    if odd := [name for name in names if Path(name).name != name]:
        raise CoralError(f"{file} names {odd[0]}, which is not beside it; copy the drafter again.")
    return [file.with_name(name) for name in sorted(names)]


def _read_file(file: Path) -> dict[Any, Any]:
    reader = _READERS["model.safetensors" if file.suffix == ".safetensors" else "pytorch_model.bin"]
    try:
        return dict(reader(file))
    except Exception as error:  # torch and pickle raise many kinds
        why = POINTER if is_pointer(file) else f"cannot be read ({unreadable(error)})"
        raise CoralError(f"{file} {why}; copy the drafter again.") from error


def _named(file: Path, stored: dict[Any, Any]) -> dict[str, Tensor]:
    """Tensors by their names without prefix, but for those that are computed."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        plain = re.sub(r"^((module|model)\.)+", "", str(name))
        if _COMPUTED.search(plain):
            continue
        if not isinstance(tensor, Tensor):
            raise CoralError(f"{file} holds {name!r}, which is no tensor; give a directory of weights alone.")
        if not tensor.is_floating_point() and plain not in _IDS:
            raise CoralError(
                f"{file} holds {name} as {tensor.dtype}, which is no weight of a drafter; give one that is "
                "not quantised."
            )
        if plain in tensors:
            raise CoralError(f"{file} holds {plain} twice, with and without a prefix; keep one of them.")
        tensors[plain] = tensor
    return tensors


def _read_config(path: Path) -> dict[str, Any]:
    """What config.json says of the layers; vLLM's own layout has it under `model`."""
    config: dict[str, Any] = json_file.read(path, dict, "copy the drafter again.")
    inner = config.get("model")
    return inner if isinstance(inner, dict) else config


def drop_biases(file: Path, tensors: dict[str, Tensor]) -> None:
    """Take biases that are zero out of `tensors`; raise CoralError for others, but for fc's."""
    for name in [name for name in tensors if name.endswith(".bias")]:
        if not tensors[name].any():
            del tensors[name]
        elif name != "fc.bias":
            raise CoralError(
                f"{file}: {name} is not zero, but a drafter of ours has no bias there; use one that "
                "was trained without it."
            )


def sizes_of(stored: Stored, layer: str, target: EagleTarget) -> dict[str, Any]:
    """The sizes of a drafter, see `LlamaSizes`, from the tensors of the layer whose names begin with `layer`.

    Raises:
        CoralError: another hidden size than the target's, heads that do not fit the tensors, or a rotary type
            that changes with the length.
    """
    path, given = stored.config_file, stored.config
    rows = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in stored.tensors.items()}
    query, key = rows[f"{layer}self_attn.q_proj.weight"], rows[f"{layer}self_attn.k_proj.weight"]
    if rows["fc.weight"] != target.hidden_size:
        raise CoralError(
            f"the drafter {path.parent} has hidden size {rows['fc.weight']}, but the target {target.name} "
            f"has {target.hidden_size}; use the target that it was trained for."
        )
    heads = int(given["num_attention_heads"])
    head_dim = query // heads
    kv_heads = key // head_dim
    if query != heads * head_dim or key != kv_heads * head_dim or heads % kv_heads:
        raise CoralError(
            f"{path} says {heads} heads, which does not fit {query} rows of q_proj and {key} of k_proj; "
            "copy the drafter again."
        )
    return {
        "hidden_size": rows["fc.weight"],
        "intermediate_size": rows[f"{layer}mlp.up_proj.weight"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": target.config.vocab_size,
        "rms_norm_eps": given.get("rms_norm_eps", 1e-6),
        "hidden_act": given.get("hidden_act", "silu"),
        "rope_parameters": _rope(path, given),
        "max_position_embeddings": target.config.max_position_embeddings,
    }


def _rope(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters in any spelling; the base is 10,000 where none is given."""
    rope = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    legacy = rope.pop("type", "default")
    rope = {"rope_theta": given.get("rope_theta") or 10000.0, "rope_type": legacy, **rope}
    stretched = rope["rope_type"] == "yarn" and "original_max_position_embeddings" not in rope
    if rope["rope_type"] not in _ROTARY or stretched:
        raise CoralError(
            f"{path} asks for rotary type {rope['rope_type']!r}; a drafter's must be one of "
            f"{', '.join(_ROTARY)} (with original_max_position_embeddings), whose frequencies are the "
            "same at every length."
        )
    return rope


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise CoralError that names `path` for whatever its values cannot be made into."""
    try:
        yield
    except CoralError as error:
        if str(path.parent) in str(error):
            raise
        raise CoralError(f"{path} cannot be read: {error}") from error
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        raise CoralError(f"{path} cannot be read ({error!r}); copy the drafter again.") from error


def check_rows(
    file: Path, name: str, stored: Tensor, target: EagleTarget, own_rows: Callable[[Tensor], Tensor]
) -> None:
    """Refuse an embedding or LM head that is not the target's, but for how float16 and bfloat16 round."""
    if stored.shape != (target.vocab_size, target.hidden_size):
        raise CoralError(
            f"{file}: {name} has shape {tuple(stored.shape)}, but the target {target.name} has "
            f"{(target.vocab_size, target.hidden_size)}; use the target that the drafter was trained for."
        )
    other = 0
    for ids in torch.arange(target.vocab_size).split(4096):
        own = own_rows(ids.to(target.device)).float().cpu()
        other += int((~stored[ids].float().isclose(own, rtol=2**-7, atol=1e-6)).any(dim=1).sum())
    if other:
        raise CoralError(
            f"{file}: {other} of {target.vocab_size} rows of {name} are not those of the target "
            f"{target.name}, which the drafter is to use; use the target that it was trained for."
        )
