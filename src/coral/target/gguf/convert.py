"""A GGUF file as a plain Hugging Face directory, which transformers and this package load alike."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coral.errors import CoralError
from coral.files import atomic_directory
from coral.progress import bar, step
from coral.target.gguf.config import read_config, read_generation
from coral.target.gguf.file import File, read
from coral.target.gguf.tokenizer import read_tokenizer
from coral.target.gguf.weights import place, write_weights

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
}
"""By the name that --dtype takes: a file's own blocks have no dtype, so auto is the usual one."""


def convert(
    paths: Sequence[Path], output: str | Path, dtype: str = "auto", console: Console | None = None
) -> None:
    """Write the model in these files as `output`, in one step; a bar goes to `console`.

    Raises:
        CoralError: what the files hold cannot be read, or not exactly; `output` holds something already; the
            disk is too small.
    """
    output = Path(output)
    if dtype not in DTYPES:
        raise CoralError(f"dtype {dtype!r} is not known; use auto, float32, bfloat16 or float16.")
    if output.is_dir() and any(output.iterdir()):
        raise CoralError(f"{output} holds files already; choose an empty or new directory.")
    file = read(paths)
    with atomic_directory(output) as aside:
        write(file, aside, DTYPES[dtype], console)


def write(file: File, directory: Path, dtype: torch.dtype, console: Console | None = None) -> None:
    """Write the model in `file` into an empty directory. Raises CoralError as `convert` does."""
    config = read_config(file)
    placed = place(file, config)
    tokenizer = read_tokenizer(file)
    if len(tokenizer) > config.vocab_size:
        raise CoralError(
            f"{file.name} holds {len(tokenizer)} tokens, but embeddings of {config.vocab_size}; use another "
            "file."
        )
    needed = sum(tensor.rows * tensor.shape[-1] for tensor in placed.values()) * dtype.itemsize
    if (free := shutil.disk_usage(directory).free) < needed:
        raise CoralError(
            f"{directory.parent} has {free / 1e9:.1f} GB free, but the weights of {file.name} take "
            f"{needed / 1e9:.1f}; free some space."
        )
    config.dtype = dtype
    config.save_pretrained(directory)
    read_generation(file).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    with bar(console, f"converting {file.name}", len(placed)) as advance:
        write_weights(file, placed, config, dtype, directory / "model.safetensors", advance)
    if console is not None:
        step("Waiting for the disk to take it", long=True)
