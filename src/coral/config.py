"""Load a tree of frozen dataclasses from YAML or a mapping, with `a.b=c` overrides."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from coral.errors import CoralError

T = TypeVar("T")


def load(cls: type[T], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> T:
    """Build the dataclass `cls` from a YAML file or a mapping; later overrides win.

    Raises:
        CoralError: the file cannot be read, a key is unknown (the nearest one is named), a value has the
        wrong type
            (the key and the type it needs are named), or a key without default is missing.
    """
    if isinstance(source, Mapping):
        where, values = "the configuration", _plain(source)
    else:
        where, values = str(source), _read(Path(source))
    for override in overrides:
        _apply(values, override)
    return _build(cls, values, (), where)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CoralError(f"cannot read {path}: {error.strerror}; check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CoralError(f"{path} is not YAML: {' '.join(str(error).split())}; correct it there.") from error
    if values is not None and not isinstance(values, dict):
        raise CoralError(f"{path} must hold `key: value` lines, not {type(values).__name__}.")
    return values or {}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *parents, last = path.strip().split(".")
    if not equals or not last:
        raise CoralError(f"cannot read the override {override!r}; write it as key=value or group.key=value.")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise CoralError(
                f"the override {override!r} goes into {parent!r}, which holds one value, not keys."
            )
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CoralError(
            f"cannot read the value of the override {override!r}; put quotes around it."
        ) from error


def _build(cls: Any, values: Any, path: tuple[str, ...], where: str) -> Any:
    if not isinstance(values, dict):
        raise CoralError(f"{where}: {'.'.join(path)} must hold keys, not {values!r}.")
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    built: dict[str, Any] = {}
    for key, value in values.items():
        name = ".".join((*path, str(key)))
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
            raise CoralError(f"{where}: unknown key {name}; did you mean {'.'.join((*path, *nearest))}?")
        if dataclasses.is_dataclass(hints[key]):
            built[key] = _build(hints[key], value, (*path, key), where)
            continue
        try:
            built[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            kind = getattr(hints[key], "__name__", None) if isinstance(hints[key], type) else str(hints[key])
            raise CoralError(
                f"{where}: {name} must be {str(kind).removeprefix('typing.')}, not {value!r}."
            ) from error
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in built:
            raise CoralError(f"{where}: {'.'.join((*path, field.name))} is missing; add it.")
    return cls(**built)
