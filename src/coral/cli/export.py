"""`coral export` and `coral import`: drafters for other engines, and from them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from coral.cli import options
from coral.errors import CoralError
from coral.progress import spinner

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def export(
    drafter: Annotated[str, typer.Argument(help="Drafter that `coral train` wrote: a directory or hub id.")],
    to: Annotated[str, typer.Option(help="vllm, vllm-coral, sglang, eagle or llama.cpp.")],
    output: Annotated[
        Path,
        typer.Option(
            help="Directory to write, for llama.cpp a file OUTPUT.gguf: new, empty or an older export."
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Target: a directory or hub id, named in the command that serves; eagle and llama.cpp "
            "read it, llama.cpp from a GGUF file, too. "
            "Default: the one that the drafter was trained for."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Store as auto (as it is), float32, bfloat16 or float16; llama.cpp: f32, f16, bf16 or q8_0."
        ),
    ] = "auto",
    head: Annotated[
        str, typer.Option(help="For vllm-coral: routed, static, low_rank, or auto for its own.")
    ] = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Write a drafter as another engine loads it, and print the command that serves it.

    \b
    vllm         vLLM, method eagle or, for drafters of kind eagle3, eagle3:
                 drafts a chain with the full LM head.
    vllm-coral   The same with a cheaper head, which needs this package in
                 vLLM's environment (pip install --no-deps coral-drafter).
                 Experimental.
    sglang       SGLang, algorithm EAGLE or EAGLE3: drafts a tree. With EAGLE,
                 a static head (coral train-head --kind static) goes along as
                 its token map.
    eagle        The EAGLE code base: pytorch_model.bin, without kind eagle3
                 with the target's embedding.
    llama.cpp    llama-server and what is built on it, --spec-type
                 draft-eagle3: one GGUF file for drafters of kind eagle3.

    What a format cannot carry is refused by name; heads that it has no place for are left out, and named.
    `coral import` reads all of them back but llama.cpp's.
    """
    with spinner("Loading"):
        from coral.drafters import checkpoint
        from coral.export import llama_cpp, write

    if to != llama_cpp.NAME:
        write.find(to)
    known = ("auto", *llama_cpp.DTYPES) if to == llama_cpp.NAME else _DTYPES
    if dtype not in known:
        raise CoralError(f"dtype {dtype!r} is not known; use {', '.join(known[:-1])} or {known[-1]}.")
    directory = checkpoint.locate(drafter)
    recorded = checkpoint.read_config(directory)["target"]
    if target is None:
        target = recorded["name"]
        revision = revision or recorded["revision"]
    if to == llama_cpp.NAME:
        _to_llama_cpp(directory, output, target, dtype, revision, trust_remote_code)
    else:
        _to_directory(directory, to, output, target, dtype, head, revision, trust_remote_code)


def _to_directory(
    directory: Path,
    to: str,
    output: Path,
    target: str,
    dtype: str,
    head: str,
    revision: str | None,
    trust_remote_code: bool,
) -> None:
    import torch

    from coral.export import write
    from coral.target import default as models

    format, loaded = write.format_of(to, directory), None
    if format.READS_TARGET:
        known = None if target == models.SMOLLM2.name else target  # which is at hand, or fetched
        loaded = options.load_target(known, "auto", None, revision, trust_remote_code)
    asked = None if dtype == "auto" else getattr(torch, dtype)
    served = _served(target)
    done = write.export(directory, to, output, served=served, target=loaded, dtype=asked, head=head)
    print(f"drafter for {to}: {output}")
    if done.token_map is not None:
        print(f"static head: written as the token map {done.token_map}")
    if done.head is not None:
        print(f"{done.head} head: goes along; run `pip install --no-deps coral-drafter` beside vLLM")
    if done.left_out:
        heads = ", ".join(done.left_out)
        why = (
            f"{to} has no place for them, so drafting costs more there"
            if done.head is None
            else "name another one to go along with --head"
        )
        print(f"left out: heads ({heads}); {why}")
    if format.READS_TOKEN_MAP and done.token_map is None:
        print(
            "no token map: for drafting with fewer ids, run `coral train-head "
            f"{directory} --data DATA --kind static`, and export again"
        )
    print("serve it with:")
    if served != target:
        print(f"coral convert {shlex.quote(target)} {shlex.quote(served)}")
    print(done.command)


def _to_llama_cpp(
    directory: Path, output: Path, target: str, dtype: str, revision: str | None, trust_remote_code: bool
) -> None:
    from coral.export import llama_cpp, llama_cpp_target
    from coral.target import default as models

    if target == models.SMOLLM2.name:
        target = str(models.fetch())  # which is at hand, or fetched
    served = llama_cpp_target.find(target, revision, trust_remote_code)
    llama_cpp.export(directory, output, served, dtype)
    print(f"drafter for {llama_cpp.NAME}: {output} ({output.stat().st_size / 1e6:.1f} MB)")
    print("with several slots (-np), add --no-spec-draft-backend-sampling, or little is accepted")
    print("serve it with:")
    print(llama_cpp.command(output, served))


def _served(target: str) -> str:
    """What an engine serves: the target, or the Hugging Face directory that a GGUF file is converted to."""
    from coral.target.gguf.names import is_gguf

    if not is_gguf(target):
        return target
    name = Path(target).name.replace(":", "-")
    return f"{name[:-5] if name.lower().endswith('.gguf') else name}-hf"


def import_(
    source: Annotated[
        str,
        typer.Argument(help="EAGLE-1, -2, -3 or HASS drafter: a directory or hub id, perhaps ID@REVISION."),
    ],
    target: Annotated[str, typer.Option(help="Target that it was trained for: a directory or hub id.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Drafter directory to write. Default: SOURCE's name with -coral."),
    ] = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Make a drafter of ours out of a published one, or out of an export.

    Its tensors decide what it is, not its config.json; one without a place in ours is refused by name. They
    are kept as they are stored.
    """
    with spinner("Loading"):
        from coral.drafters import checkpoint
        from coral.export.read import read, refuse_foreign
        from coral.target.record import TargetRecord

    refuse_foreign(source)
    directory = checkpoint.locate(source)
    refuse_foreign(directory)
    output = output or Path(f"{Path(source).absolute().name}-coral")
    checkpoint.refuse_foreign(output)
    loaded = options.load_target(target, "auto", None, revision, trust_remote_code)
    drafter = read(directory, loaded)
    record = TargetRecord.of(loaded)
    if outdated := checkpoint.outdated(output, record):
        print(outdated, file=sys.stderr)
    checkpoint.save(drafter, output, target=record, recipe={"imported_from": source})
    dtype = str(drafter.fc.weight.dtype).removeprefix("torch.")
    bias = ", with the trained bias of its fc" if getattr(drafter.config, "fc_bias", False) else ""
    print(f"drafter of {drafter.num_parameters:,} parameters, {dtype}{bias}: {output}")
    print(f"write with it: coral generate --target {target} --drafter {output}")
