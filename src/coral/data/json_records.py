"""JSON records of a file, one at a time, whatever its form: one a line, or the elements of an array; packed
with gzip, bzip2 or xz, or not; in UTF-8, UTF-16 or UTF-32. The content decides, not the name.

Nothing is parsed here: a record is handed on as the bytes that stand there, so that what is wrong with one of
them is told of that one.
"""

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from coral.errors import CoralError

_PIECE = 1 << 20  # bytes that are read at once, more where a record is longer
_PACKED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_FOREIGN = {b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
# A string, perhaps without its end (group 1 is then empty), or what the depth and the ends follow from.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("?)|[][{},]', re.DOTALL)


def json_records(path: Path) -> Iterator[bytes]:
    """Yield the file's records in UTF-8, in order; of lines, empty ones too, so that they can be numbered.

    A file that begins with `[` is an array, and what follows its end are lines again. A `.json` file that
    begins with an object over several lines holds such objects, one after another.

    Raises:
        CoralError: packed in a way that is not read.
        OSError, EOFError, ValueError, zlib.error, lzma.LZMAError: it cannot be read to its end.
    """
    with _opened(path) as file:
        while (head := file.peek(1)[:1]).isspace():
            if file.read(1) == b"\n":
                yield b""
        if head == b"[":
            yield from _values(file, array=True)
        elif head == b"{" and ".json" in path.suffixes:
            first = file.readline()
            if first.rstrip()[-1:] in b"{[,:":  # no line of records ends so
                yield from _values(file, array=False, begun=first)
            else:
                yield first
        yield from file


def _opened(path: Path) -> io.BufferedReader:
    """The file, decompressed and in UTF-8."""
    with path.open("rb") as raw:
        magic = raw.read(8)
    for begin, name in _FOREIGN.items():
        if magic.startswith(begin):
            raise CoralError(
                f"{path} is packed with {name}, which is not read; unpack it, or pack it with gzip."
            )
    unpack = next((each for begin, each in _PACKED.items() if magic.startswith(begin)), None)
    file = io.BufferedReader(path.open("rb") if unpack is None else unpack(path))
    encoding = json.detect_encoding(file.peek(4)[:4])  # by a byte order mark, or by where the zeros are
    if encoding.startswith("utf-8"):
        file.read(3 if encoding == "utf-8-sig" else 0)
        return file
    text = io.TextIOWrapper(file, encoding, "surrogatepass", newline="")
    return io.BufferedReader(_Recoded(text))


class _Recoded(io.RawIOBase):
    """Text as UTF-8 bytes. An unpaired surrogate is kept, so that its record is refused."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.rest = text, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.rest = self.rest or self.text.read(_PIECE).encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count

    def close(self) -> None:
        self.text.close()
        super().close()


def _values(file: IO[bytes], *, array: bool, begun: bytes = b"") -> Iterator[bytes]:
    """The elements of the array that the file goes on with, or the values that follow one another to its end.

    Only brackets, commas and strings are told apart, so a record that is no JSON within them is one record.
    """
    buffer, start, at, depth = begun, 0, 0, 0  # the record begins at `start`; all before `at` is understood
    while True:
        token = _TOKEN.search(buffer, at)
        if token is None or token.group(1) == b"":  # nothing more in the buffer, or a string without its end
            buffer, at = buffer[start:], (len(buffer) if token is None else token.start()) - start
            start = 0
            more = file.read(max(_PIECE, len(buffer)))
            if not more:
                if array:
                    raise ValueError("the array of records has no end")
                if buffer.strip():
                    yield buffer
                return
            buffer += more
            continue
        at, kind = token.end(), token.group()[:1]
        depth += (kind in b"[{") - (kind in b"]}")
        if array and depth == 1 and kind == b"[" and start == 0 and not buffer[: token.start()].strip():
            start = at
        elif array and ((kind == b"," and depth == 1) or depth == 0):
            if depth or buffer[start : token.start()].strip():
                yield buffer[start : token.start()]
            start = at
        elif not array and depth <= 0 and kind in b"]}":
            yield buffer[start:at]
            start, depth = at, 0
        if array and depth == 0:
            rest = buffer[at:] if buffer.endswith(b"\n") else buffer[at:] + file.readline()
            yield from io.BytesIO(rest.lstrip(b" \t\r").removeprefix(b"\n"))
            return
