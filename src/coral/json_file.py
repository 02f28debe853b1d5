"""JSON files of ours, read one way: what is damaged is a sentence that says where, and what to do.

A schema is anything that pydantic takes for a type: a dataclass, a TypedDict, `list[list[int]]`. It is
strict: no value is turned into another type, no number is NaN or infinite, no dataclass has an unknown key.
"""

import json
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from coral.errors import CoralError

T = TypeVar("T")

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""`__pydantic_config__` of a schema; classes inside it that have none follow it."""
OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
"""`STRICT` for a file to which later versions may add keys."""

Size = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Seconds = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


def read(path: Path, schema: type[T], advice: str) -> T:
    """The content of the file `path` as `schema`; `advice` ends the message of an error.

    Raises:
        CoralError: the file cannot be read, is no JSON, or is not as the schema says.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CoralError(f"{path} cannot be read ({error.strerror}); {advice}") from error
    return parse(content, schema, str(path), advice)


def parse(content: bytes, schema: type[T], where: str, advice: str) -> T:
    """`read` for bytes that stand at `where`, such as a line of a file."""
    try:
        return cast(T, _adapter(cast(Hashable, schema)).validate_json(_readable(content)))
    except ValidationError as error:
        raise CoralError(f"{where} cannot be read ({_why(error)}); {advice}") from error


def check(content: Any, schema: type[T], where: str, advice: str) -> T:
    """`read` for a value that another reader, such as `torch.load`, found at `where`."""
    try:
        return cast(T, _adapter(cast(Hashable, schema)).validate_python(content))
    except ValidationError as error:
        raise CoralError(f"{where} cannot be read ({_why(error)}); {advice}") from error


@cache
def _adapter(schema: Hashable) -> TypeAdapter[Any]:
    has_own = hasattr(schema, "__pydantic_config__") or hasattr(schema, "__dataclass_fields__")
    kind: Any = schema
    return TypeAdapter(kind, config=None if has_own else STRICT)


def _readable(content: bytes) -> bytes:
    """The content with question marks for unpaired surrogates (Python's undecodable bytes of file names)."""
    if b"\\ud" not in content and b"\\uD" not in content:
        return content
    try:
        return json.dumps(json.loads(content), ensure_ascii=False).encode("utf-8", "replace")
    except (ValueError, RecursionError):
        return content  # pydantic will refuse it


def _why(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    what = first["msg"].removeprefix("Value error, ").removeprefix("Invalid JSON: ")
    what = what if what[:2].isupper() else what[:1].lower() + what[1:]
    return " ".join(f"{place}: {what}".removeprefix(": ").split())[:300].rstrip(".")
