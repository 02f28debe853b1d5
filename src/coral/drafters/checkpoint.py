"""The checkpoint: one directory on disk, the only thing that training and decoding share.

The top level is what other engines read, if any knows the kind: `model.safetensors` with exactly the tensors
of the drafter and `config.json`, in the plain EAGLE or EAGLE-3 layout of vLLM and SGLang. What
those engines do not know lies in `coral/config.json`: the kind of drafter, the target states that it reads,
the target it belongs to, the drafter's options, and the recipe and measurements it came from.
`custom_generate/` lets transformers' `generate` draft with the directory; nothing here reads it.
"""

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from coral import json_file
from coral.drafters import kinds
from coral.errors import CoralError
from coral.files import POINTER, atomic_directory, is_pointer, replaceable
from coral.json_file import STRICT
from coral.target import download
from coral.target.record import TargetLike, TargetRecord, check_target

FORMAT_VERSION = 1
CUSTOM_GENERATE = Path(__file__).parents[1] / "integrations" / "transformers" / "custom_generate"
"""What transformers runs for `generate(..., custom_generate=DRAFTER)`; every drafter carries a copy."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WEIGHTS = ("config.json", "model.safetensors", "coral/config.json", "custom_generate/*")
_MADE_FOR_WEIGHTS = ("coral/trees.json", "coral/training/*")

_Config = TypeVar("_Config")


@dataclass(frozen=True)
class _Record(Generic[_Config]):
    """What coral/config.json holds; `drafter` is the kind's `Config`."""

    __pydantic_config__ = STRICT
    format_version: int
    kind: str
    layers: list[int]
    target: TargetRecord
    drafter: _Config
    recipe: dict[str, Any] | None
    metrics: dict[str, Any] | None


def save(
    drafter: Any,
    directory: str | Path,
    *,
    target: TargetRecord,
    recipe: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> None:
    """Write a drafter of any kind as `directory`, in one step: an older drafter there is replaced only when
    all is written. What else lies there stays, see `replaced`.

    Raises:
        CoralError: the directory holds something that is not a drafter, a weight is not finite, or the disk
            refuses the write.
    """
    directory = Path(directory)
    refuse_foreign(directory)
    with atomic_directory(directory, ours=replaced(directory, target)) as aside:
        write(drafter, aside, target=target, recipe=recipe, metrics=metrics)


def refuse_foreign(directory: Path) -> None:
    """Raise CoralError if `directory` holds anything but a drafter of ours, or cannot be replaced by one."""
    replaceable(directory)
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "coral" / "config.json").exists():
        raise CoralError(f"{directory} holds files that are not a drafter; choose an empty or new directory.")


def replaced(directory: Path, target: TargetRecord) -> list[str]:
    """Patterns of what the directory of a drafter loses when another one is written there: all that was made
    for its weights; heads too where the target is another one.
    """
    other = _is_for_another(directory, target)
    return [*_WEIGHTS, *_MADE_FOR_WEIGHTS, *(["coral/heads/*"] if other else [])]


def outdated(directory: Path, target: TargetRecord) -> str | None:
    """What new weights make stale in the directory of a drafter, in a sentence; None: nothing."""
    stale = []
    if (directory / "coral" / "trees.json").exists():
        stale.append("coral/trees.json is dropped (run `coral tune` again)")
    heads = sorted(path.stem for path in (directory / "coral" / "heads").glob("*.safetensors"))
    if _is_for_another(directory, target):
        stale += [f"the heads {', '.join(heads)} are dropped (they are for another target)"] if heads else []
    elif heads := [kind for kind in heads if kind != "static"]:
        stale.append(f"the heads {', '.join(heads)} stay (make them again with `coral train-head`)")
    if not stale:
        return None
    return f"{directory} holds what was made for the weights that it had: {'; '.join(stale)}"


def _is_for_another(directory: Path, target: TargetRecord) -> bool:
    """Whether a directory holds a drafter of another target; False where none can be read there."""
    try:
        return not TargetRecord(**read_config(directory)["target"]).has_weights_of(target)
    except CoralError:
        return False


def write(
    drafter: Any,
    directory: Path,
    *,
    target: TargetRecord,
    recipe: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> None:
    """Write the files of a drafter into an existing directory; see `save` for the safe way.

    Raises:
        CoralError: a weight is not finite.
    """
    kind = kinds.find(drafter.kind)
    if odd := not_finite(drafter.state_dict()):
        raise CoralError(f"the drafter is not written, for {odd} is not finite; train it anew.")
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in drafter.state_dict().items()
    }
    ours = {
        "format_version": FORMAT_VERSION,
        "kind": drafter.kind,
        "layers": kind.layers(drafter.config),
        "target": asdict(target),
        "drafter": asdict(drafter.config),
        "recipe": recipe,
        "metrics": metrics,
    }
    (directory / "coral").mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(serialise(tensors, metadata={"format": "pt"}))
    if (told := kind.engine_config(drafter.config, _dtype(tensors))) is not None:
        write_json(directory / "config.json", told)
    write_json(directory / "coral" / "config.json", ours)
    (directory / CUSTOM_GENERATE.name).mkdir(exist_ok=True)
    for name in ("generate.py", "requirements.txt"):
        copyfile(CUSTOM_GENERATE / name, directory / CUSTOM_GENERATE.name / name)


def load(
    source: str | Path,
    target: TargetLike | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Read a drafter from where `locate` finds it, ready to run (no gradients, evaluation mode).

    Returns:
        A `Drafter` of its kind, in the dtype that it is stored in if no other is given.

    Raises:
        CoralError: nothing there, not a drafter of ours, tensors missing, left over, of another shape or not
            finite, or a drafter that belongs to another target than the one given.
    """
    directory = locate(source)
    ours = read_config(directory)
    kind, config = kinds.find(ours["kind"]), config_of(ours)
    file = directory / "model.safetensors"
    if target is not None:
        check_target(directory, TargetRecord(**ours["target"]), TargetRecord.of(target))
        config.check_sizes(target)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        why = POINTER if is_pointer(file) else f"cannot be read ({error})"
        raise CoralError(f"{file} {why}; copy the drafter again.") from error
    empty = _empty(directory, kind, config)
    check_tensors(file, {name: tensor.shape for name, tensor in empty.items()}, tensors)
    if odd := [name for name, tensor in tensors.items() if not _fits(tensor.dtype, empty[name].dtype)]:
        raise CoralError(f"{file}: {odd[0]} is stored as {tensors[odd[0]].dtype}; copy the drafter again.")
    if name := not_finite(tensors):
        raise CoralError(
            f"{file}: {name} holds numbers that are not finite; copy the drafter again, or train it anew."
        )
    drafter = kind.Drafter(config).to(dtype=dtype or _dtype(tensors))
    drafter.load_state_dict(tensors)
    return drafter.to(device=device).eval().requires_grad_(False)


def config_of(ours: dict[str, Any]) -> Any:
    """The `Config` of the drafter whose record `read_config` gave."""
    return kinds.find(ours["kind"]).Config(**ours["drafter"])


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a drafter's weights, which share one; float32 where it has none."""
    return next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)


def _fits(found: torch.dtype, expected: torch.dtype) -> bool:
    """Whether a tensor of a drafter may be stored so: weights in any of `_DTYPES`, ids as they are."""
    return found in _DTYPES if expected.is_floating_point else found == expected


def _empty(directory: Path, kind: kinds.Kind, config: Any) -> dict[str, Tensor]:
    """A drafter's tensors without memory."""
    try:
        with torch.device("meta"):
            empty: nn.Module = kind.Drafter(config)
        return empty.state_dict()
    except Exception as error:  # what transformers makes of rotary parameters that do not go together
        path = directory / "coral" / "config.json"
        raise CoralError(f"{path} describes no drafter ({error!r}); copy the drafter again.") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's own record, `coral/config.json`; raises CoralError when it is absent, broken or too
    new.
    """
    path, again = directory / "coral" / "config.json", "copy the drafter again."
    if not path.exists():
        raise CoralError(
            f"{directory} is not a CORAL drafter: {path} is missing; check the path, or take in a drafter of "
            "another format with `coral import`."
        )
    ours: dict[str, Any] = json_file.read(path, dict, again)
    version, kind, layers = (ours.get(key) for key in ("format_version", "kind", "layers"))
    if type(version) is not int or not isinstance(kind, str):
        raise CoralError(f"{path} does not say its format_version and kind; {again}")
    if version != FORMAT_VERSION or kind not in kinds.KINDS:
        raise CoralError(
            f"{directory} has format {version}, kind {kind!r}, but this version reads format "
            f"{FORMAT_VERSION}, kind {' or '.join(kinds.KINDS)}; update CORAL."
        )
    schema: Any = _Record
    json_file.read(path, schema[kinds.find(kind).Config], again)
    if layers != (reads := [*kinds.find(kind).layers(config_of(ours))]):
        raise CoralError(
            f"{directory} reads the target states {layers}, but in this version drafters of kind {kind!r} "
            f"read {reads}; update CORAL."
        )
    return ours


def locate(source: str | Path) -> Path:
    """The directory of a drafter: `source` itself, or the download of a hub id such as "me/drafter", perhaps
    at a branch, tag or commit: "me/drafter@v1".

    Raises:
        CoralError: there is no such directory, repository or revision, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    name, pinned, revision = str(source).partition("@")
    if pinned and Path(name).is_dir():
        raise CoralError(f"{name} is a directory, which has no revisions; leave out @{revision}.")
    if isinstance(source, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CoralError(f"there is no drafter directory {source}; check the path.")
    if pinned and not revision:
        raise CoralError(f"{source!r} names no revision; write it as {name}@REVISION, or leave out the @.")
    return download.drafter(name, revision or None)


def own_directory(source: str | Path) -> Path:
    """The directory of a drafter that is to be changed; raises CoralError when it is on the hub, whose
    downloads are shared and not ours to change.
    """
    directory = locate(source)
    if directory != Path(source):
        name, _, revision = str(source).partition("@")
        pinned = f" --revision {revision}" if revision else ""
        raise CoralError(
            f"{source} is on the hub, and a download from there is never changed; copy it with "
            f"`hf download {name}{pinned} --local-dir DRAFTER`, and name that directory instead."
        )
    return directory


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity, if there is one."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def check_names(file: Path, expected: Set[str], found: Set[str]) -> None:
    """Raise CoralError that names the tensors which `file` lacks, or holds without a place for them."""
    wrong = []
    if missing := sorted(expected - found):
        wrong.append(f"lacks the tensors {', '.join(missing)}")
    if extra := sorted(found - expected):
        wrong.append(f"holds tensors that the drafter has no place for: {', '.join(extra)}")
    if wrong:
        raise CoralError(f"{file} {' and '.join(wrong)}; copy the drafter again, or use another one.")


def check_tensors(file: Path, expected: dict[str, torch.Size], found: dict[str, Tensor]) -> None:
    """Raise CoralError unless the tensors found in `file` have exactly these names and shapes."""
    check_names(file, expected.keys(), found.keys())
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CoralError(
                f"{file}: {name} has shape {tuple(found[name].shape)}, but its config asks for "
                f"{tuple(shape)}; copy the drafter again."
            )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that people read, too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
