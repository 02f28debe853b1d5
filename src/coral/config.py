"""Load a tree of frozen dataclasses from YAML or a mapping, with `a.b=c` overrides."""

import dataclasses
import difflib
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from coral.errors import CoralError

T = TypeVar("T")


def load(
    cls: type[T] | Callable[[Mapping[str, Any]], type[T]],
    source: str | Path | Mapping[str, Any],
    overrides: str | Sequence[str] = (),
) -> T:
    """Build a dataclass from a YAML file or a mapping; later overrides win.

    Args:
        cls: the dataclass, or a function that chooses it by the values.

    Raises:
        CoralError: the file cannot be read, a key is unknown (the nearest one is named), a value has the
            wrong type or is out of bounds (the key and what it needs are named), or a key without default is
            missing.
    """
    if isinstance(source, Mapping):
        where, values = "the configuration", _plain(source)
    else:
        where, values = str(source), _read(Path(source))
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _apply(values, override)
    return cast(T, _build(cls if isinstance(cls, type) else cls(values), values, (), where))


def check(values: Any, *path: str) -> None:
    """Raise CoralError for a value of a dataclass that is not what the type of its field says, bounds
    (`Annotated[float, Field(gt=0)]`) included; `load` has done that for what it read.
    """
    for name, hint in get_type_hints(type(values), include_extras=True).items():
        value = getattr(values, name)
        if dataclasses.is_dataclass(value):
            check(value, *path, name)
        else:
            _value(hint, value, ".".join((*path, name)))


def _value(hint: Any, value: Any, name: str) -> Any:
    try:
        if isinstance(value, bool) and hint is not bool:
            value = str(value)  # pydantic takes it for a number
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        raise CoralError(f"{name} must be {_wanted(hint, error)}, not {reprlib.repr(value)}.") from error


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))


def _wanted(hint: Any, error: ValidationError) -> str:
    """What a value has to be, in words."""
    for each in error.errors(include_url=False, include_input=False):
        bounds = each.get("ctx", {})
        match each["type"]:
            case "greater_than_equal":
                return f"at least {bounds['ge']:g}"
            case "greater_than":
                return f"above {bounds['gt']:g}"
            case "less_than_equal":
                return f"at most {bounds['le']:g}"
            case "less_than":
                return f"below {bounds['lt']:g}"
            case "finite_number":
                return "a finite number"
    parts = [
        getattr(part, "__origin__", part) if get_origin(part) is Annotated else part
        for part in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
    ]
    names = [part.__name__ if isinstance(part, type) else str(part) for part in parts]
    return " or ".join("none" if name == "NoneType" else name.removeprefix("typing.") for name in names)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CoralError(f"cannot read {path}: {error.strerror}; check the path.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no such date
        reason = " ".join(str(error).split())[:300]
        raise CoralError(f"{path} is not YAML: {reason}; correct it there.") from error
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CoralError(
            f"cannot read the value of the override {override!r}; put quotes around it."
        ) from error


def _build(cls: Any, values: Any, path: tuple[str, ...], where: str) -> Any:
    if not isinstance(values, dict):
        raise CoralError(f"{where}: {'.'.join(path)} must hold keys, not {reprlib.repr(values)}.")
    hints = get_type_hints(cls, include_extras=True)
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
        built[key] = _value(hints[key], value, f"{where}: {name}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in built:
            raise CoralError(f"{where}: {'.'.join((*path, field.name))} is missing; add it.")
    return cls(**built)
