"""Options that several commands share, so that each reads the same everywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coral.errors import CoralError
from coral.files import refuse_missing
from coral.progress import spinner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from coral.data.prepared import PreparedData
    from coral.target.target import Target as Target_
    from coral.tree import TreeSize

Target = Annotated[
    str | None,
    typer.Option(
        help="Target: a directory, a hub id or a GGUF file (FILE.gguf, ORG/REPO:Q4_K_M). Default: "
        "SmolLM2-135M-Instruct, fetched once."
    ),
]
Data = Annotated[
    Path, typer.Option(help="Directory that `coral data prepare` or `coral data features` wrote.")
]
Drafter = Annotated[
    str | None,
    typer.Option(
        help="Drafter: a directory or hub id, perhaps as ID@REVISION (add '+ngram' for lookup in the same "
        "tree, '+static' and so on for one of its heads), 'ngram' or 'plain'. Default: the package's "
        "for the default target, else plain."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (as stored; of a GGUF file bfloat16), float32, bfloat16, float16, or packed: a GGUF "
        "file's own blocks, unrounded (Q8_0, Q4_1 and Q4_0, on a CPU), as auto is in generate, demo and "
        "tune without --target."
    ),
]
Device = Annotated[str | None, typer.Option(help="Device, for example cuda. Default: where it fits.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Place a target that is too large for one device: auto spreads it over the GPUs, then the CPU's "
        "memory (or balanced, sequential)."
    ),
]
Tree = Annotated[
    str | None,
    typer.Option(
        "--tree",
        help="Draft tree as TOP_K,MAX_DEPTH,NUM_NODES, perhaps with ,MIN_GAIN: grow no level, and on a CPU "
        "verify no node, that is less likely to be reached. Larger trees accept more and cost more. "
        "Default: what `coral tune` found for the drafter on this machine, else a built-in one.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        help="What computes the target: native (C++, on a CPU, in float32 and bf16), transformers (its own "
        "code), graphs (recorded on a GPU, after a minute of compiling), or auto: native where that can be.",
        metavar="auto|native|transformers|graphs",
    ),
]
Head = Annotated[
    str,
    typer.Option(
        help="The drafter's LM head: full, in_context (ids of the text at hand; needs no training), routed, "
        "static, low_rank, or auto: its own, else in_context."
    ),
]
Coupled = Annotated[
    bool, typer.Option(help="At temperature > 0, draft with the noise that the sampler will use.")
]
Fallback = Annotated[bool, typer.Option(help="Take plain steps while drafting is slower than they are.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the target on the hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the target.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.", min=0, max=2**63 - 1)]


def read_tree_size(tree: str | None) -> TreeSize | None:
    """What --tree says; None where it is not given.

    Raises:
        CoralError: it cannot be read, or is out of range.
    """
    from coral.tree import TreeSize

    if tree is None:
        return None
    try:
        parts = tree.split(",")
        top_k, max_depth, num_nodes = (int(part) for part in parts[:3])
        (min_gain,) = (float(part) for part in parts[3:] or ["0"])
    except ValueError:
        raise CoralError(
            f"cannot read --tree {tree!r}; write it as TOP_K,MAX_DEPTH,NUM_NODES or with ,MIN_GAIN."
        ) from None
    return TreeSize(top_k, max_depth, num_nodes, min_gain)


def read_part(part: str) -> tuple[int, int]:
    """What --shard says, as (I, N).

    Raises:
        CoralError: it cannot be read, or is out of range.
    """
    number, slash, parts = part.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise CoralError(f"cannot read --shard {part!r}; write it as I/N, with I from 1 to N.")
    return int(number), int(parts)


def read_layers(layers: str, target: Target_) -> tuple[int, ...]:
    """What --layers says: layers of the target, from 0.

    Raises:
        CoralError: it cannot be read, or the target has no such layer.
    """
    numbers, count = [*filter(None, layers.split(","))], target.facts.num_layers
    if any(not number.strip().isdecimal() or int(number) >= count for number in numbers):
        raise CoralError(
            f"cannot read --layers {layers!r}; write numbers from 0 to {count - 1} with commas between them."
        )
    return tuple(dict.fromkeys(map(int, numbers)))


def read_drafters(items: list[str]) -> dict[str, str]:
    """What --drafter says, given any number of times: what `coral generate` takes, perhaps as NAME=DRAFTER.

    Without a name a drafter is called what its directory or repository is, with what stands behind it.

    Raises:
        CoralError: one of them cannot be read, or two have the same name.
    """
    drafters: dict[str, str] = {}
    for item in items:
        name, named, source = item.partition("=")
        if not named or "/" in name:  # a path may hold a "=", a name no "/"
            name, source = _own_name(item), item
        if not (name and source):
            raise CoralError(f"cannot read --drafter {item!r}; write it as DRAFTER or NAME=DRAFTER.")
        if name in drafters:
            raise CoralError(
                f"two drafters are called {name!r}; name them apart, with --drafter NAME={source}."
            )
        drafters[name] = source
    return drafters


def _own_name(drafter: str) -> str:
    from coral.drafters.drafting import Drafting

    source = Drafting.parse(drafter).source
    if source is None:
        return drafter
    own = Path(source).resolve() if Path(source).is_dir() else Path(source)
    return own.name + drafter.removeprefix(str(source))


def load_target(
    target: str | None,
    dtype: str,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
    rows: PreparedData | None = None,
    device_map: str | None = None,
    to_write: bool = False,
    reads_much: bool = False,
) -> Target_:
    """The target that a command works on, by default SmolLM2; `rows` must have been prepared for it.

    Args:
        to_write: load the default as `coral generate` does.
        reads_much: many rows at a time, see `Target.for_many_rows`.

    Raises:
        CoralError: it cannot be loaded, or the data is for another tokenizer.
    """
    from coral.data.chat_format import end_answers
    from coral.data.prepared import check
    from coral.target import default as models
    from coral.target.target import Target as Target_

    quiet_transformers()
    placed: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map}
    with spinner(f"Loading {target or models.SMOLLM2.name}"):
        if target is None:
            loaded = (models.load_to_write if to_write else models.load)(**placed)
        else:
            loaded = Target_.load(target, revision=revision, trust_remote_code=trust_remote_code, **placed)
        if reads_much and dtype == "auto":
            loaded = loaded.for_many_rows()
    end_answers(loaded)
    if rows is not None:
        check(rows.info, loaded.vocab_size, loaded.tokenizer)
    return loaded


def read_tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """What --tokenizer names.

    Raises:
        CoralError: there is no such tokenizer, or its files are damaged.
    """
    from coral.target.gguf import cache as gguf
    from coral.target.loading import load_tokenizer

    if (found := gguf.tokenizer(source, revision)) is not None:
        return found
    refuse_missing(source, "tokenizer")
    loaded: PreTrainedTokenizerBase = load_tokenizer(
        source, source, revision=revision, trust_remote_code=trust_remote_code
    )
    return loaded


def quiet_transformers() -> None:
    """Keep its bars and advice off standard error, without importing it; see `target.loading`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
