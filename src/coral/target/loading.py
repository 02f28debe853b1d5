"""A Hugging Face directory or hub id -> config, tokenizer and model, whole or not at all.

transformers fills what a checkpoint lacks with random numbers, and passes over what it has no place for. The
text would be another one without a word, so both are refused here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from rich.console import Console
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from coral.errors import CoralError
from coral.files import POINTER, is_pointer, refuse_missing
from coral.target.families import check_supported
from coral.target.gguf import cache as gguf
from coral.target.gguf.names import hint
from coral.target.grouped_sdpa import GROUPED_SDPA

_BUFFERS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|self_attn\.(masked_)?bias$")
"""Tensors that older checkpoints hold although they follow from the config."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "tokenizer.json", "tokenizer.model")


def load(
    source: str, tokenizer: Any, dtype: str, trust_remote_code: bool, how: dict[str, Any]
) -> tuple[Any, Any, str | None]:
    """Model, tokenizer and revision; see `Target.load`, whose options `how` are device, device_map, attention
    and revision.

    Raises:
        CoralError: not found, not supported (said before weights are read), or weights that do not fit.
    """
    if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":  # as our commands set it
        quiet()
    place, revision, attention = source, how["revision"], how["attention"]
    if (converted := gguf.directory(source, dtype, revision, Console(stderr=True))) is not None:
        place, dtype, revision = str(converted), "auto", None
        tokenizer = tokenizer or gguf.load_tokenizer(converted, source)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(place, source, **common)
    tokenizer = tokenizer or load_tokenizer(place, source, **common)
    model = load_model(
        place,
        source,
        config=config,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=GROUPED_SDPA if attention == "sdpa" else attention,
        device_map=how["device_map"],
        device=how["device"],
        **common,
    )
    return model, tokenizer, revision or getattr(config, "_commit_hash", None)


def quiet() -> None:
    """Transformers keeps its bars and advice to itself; downloads, which take minutes, go on showing bars."""
    hub_is_quiet = are_progress_bars_disabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not hub_is_quiet:
        enable_progress_bars()


def load_config(place: str, name: str, **common: Any) -> Any:
    """The config of a target; `name` is what messages call `place`. `common`: revision, trust_remote_code.

    Raises:
        CoralError: there is none, or no model of it can be a target.
    """
    refuse_missing(place, "target")
    if Path(place).exists() and not (Path(place) / "config.json").is_file():
        raise CoralError(_no_config(Path(place), name))
    for file in (Path(place) / "config.json", Path(place) / "generation_config.json"):
        if file.is_file() and (wrong := _no_object(file)):  # transformers passes over the second in silence
            raise CoralError(f"the target {name!r} cannot be read: {wrong}; copy it again.")
    try:
        config = AutoConfig.from_pretrained(place, **common)
    except Exception as error:  # of files, or code, that others wrote
        raise CoralError(
            f"cannot read a model config from {name!r}: {_first_line(error)}; check the name."
            f"{hint(name, common.get('revision'))}"
        ) from error
    check_supported(config)
    return config


def load_tokenizer(place: str, name: str, **common: Any) -> Any:
    """The tokenizer there. Raises CoralError where there is none, or its files are damaged."""
    try:
        return AutoTokenizer.from_pretrained(place, **common)
    except Exception as error:  # as above; tokenizers raises Exception itself
        reason = pointer(Path(place)) or _damaged_json(Path(place)) or _first_line(error)
        raise CoralError(f"cannot load the tokenizer of {name!r}: {reason}; check its files.") from error


def load_model(place: str, name: str, *, device: str | None, **loading: Any) -> Any:
    """The model there, with all of its weights. `loading`: of `from_pretrained`.

    Raises:
        CoralError: weights are missing, left over, of other shapes or damaged, or the device refuses them.
    """
    model: Any
    found: dict[str, Any]
    auto: Any = AutoModelForCausalLM
    try:
        model, found = auto.from_pretrained(
            place,
            **loading,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
        if loading.get("device_map") is None and device is not None:
            model = model.to(device)
    except Exception as error:  # as above; torch asserts that it has CUDA
        reason = pointer(Path(place)) or _first_line(error)
        raise CoralError(
            f"cannot load the target {name!r}: {reason}; check its files and the device."
        ) from error
    wrong = {
        "lacks": found["missing_keys"],
        "holds without a place in the model": found["unexpected_keys"],
        "holds in other shapes": [key for key, *_ in found["mismatched_keys"]],
        "holds as whole numbers": _whole_numbers(Path(place)),
    }
    told = [f"{what} {few(keys)}" for what, names in wrong.items() if (keys := _counted(names))]
    if told:
        raise CoralError(
            f"the weights of {name!r} are not those that its config.json describes: it "
            f"{', and '.join(told)}, so its text would be another one; download it again, or use "
            "another checkpoint."
        )
    return model


def _whole_numbers(directory: Path) -> list[str]:
    """Weights that a directory holds as integers: of a quantised model without its config, whose scales would
    be left out.
    """
    found = []
    for file in sorted(directory.glob("*.safetensors")) if directory.is_dir() else ():
        with safe_open(file, "pt") as opened:
            found += [key for key in opened.keys() if opened.get_slice(key).get_dtype()[0] in "IU"]  # noqa: SIM118
    return found


def pointer(directory: Path) -> str | None:
    """What to say of a directory whose large files were not downloaded: git clones leave pointers to them."""
    if not directory.is_dir():
        return None
    for file in (file for pattern in _WEIGHTS for file in sorted(directory.glob(pattern))):
        if is_pointer(file):
            return f"{file.name} {POINTER}"
    return None


def _no_object(file: Path) -> str | None:
    """Why a file is no JSON object, if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{file.name} is no JSON ({error})"
    return None if isinstance(content, dict) else f"{file.name} holds no object of keys and values"


def _damaged_json(directory: Path) -> str | None:
    """Which of a tokenizer's files is no JSON; the error of who read it does not name it."""
    for file in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        if wrong := _no_object(file):
            return wrong
    return None


def few(names: Iterable[str]) -> str:
    """The first names of many."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _counted(names: Iterable[str]) -> list[str]:
    return [name for name in names if not _BUFFERS.search(name)]


def _no_config(place: Path, name: str) -> str:
    if (place / "adapter_config.json").is_file():
        return (
            f"{name} holds a LoRA adapter, not a model; merge it into its base model (merge_and_unload of "
            "peft), and name the result."
        )
    for pattern in ("snapshots/*/config.json", "models--*/snapshots/*/config.json"):
        for found in place.glob(pattern):
            return (
                f"{name} is a folder of the hub's cache; name the model by its hub id, or the directory "
                f"{found.parent}."
            )
    return f"{name} holds neither config.json nor a GGUF file, so it is no model; check the path."


def _first_line(error: Exception) -> str:
    """What an error says first, as the end of a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines) if lines[0].endswith(":") else lines[0]
    return re.split(r"[.!?] (?=[A-Z])", text)[0][:300].rstrip(". ")
