"""A second start: a target that can run natively stands without transformers, whose import takes seconds.

What a first start found out of a directory or GGUF file, its facts, blueprint and tokenizer, lies under
~/.cache/coral/starts. Weights are read from where they lie. Whatever else is asked of such a target loads the
model after all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from coral import __version__, json_file
from coral.errors import CoralError
from coral.files import atomic_directory, user_caches
from coral.json_file import STRICT
from coral.target.blueprint import Blueprint
from coral.target.facts import Facts
from coral.target.gguf import cache as gguf
from coral.target.gguf.blocks import Place
from coral.target.ids import outer_weights
from coral.target.recorded_tokenizer import RecordedTokenizer, TokenizerRecord

if TYPE_CHECKING:
    from coral.target.native import NativeForward
    from coral.target.target import Target

VERSION = 1
"""Of what is written down; another one is made again."""
_KEPT = 64


@dataclass(frozen=True)
class Record:
    """What is written down of a target.

    made_with: versions of what found it out. files: of every file that it follows from size and time.
    directory: where the weights lie, in safetensors.
    """

    __pydantic_config__ = STRICT
    made_with: dict[str, str]
    files: dict[str, list[int]]
    directory: str
    dtype: str
    facts: Facts
    blueprint: Blueprint
    tokenizer: TokenizerRecord | None
    blocks: dict[str, Place] | None


@dataclass(frozen=True)
class Start:
    """What a start is of, and where it is written down.

    directory: Hugging Face's, a GGUF file's conversion included. name: what messages call it.
    gguf: the files of which blocks are kept packed.
    """

    directory: Path
    name: str
    dtype: str
    gguf: tuple[Path, ...] = ()

    @classmethod
    def of(cls, source: str | Path, dtype: str, revision: str | None) -> Start | None:
        """None: nothing of it lies on this machine in a form of which a record can be kept."""
        if (converted := gguf.converted(source, dtype, revision)) is not None:
            paths, directory = converted
            return cls(directory, str(source), dtype, tuple(paths) if dtype == "packed" else ())
        directory = Path(source)
        there = dtype != "packed" and (directory / "config.json").is_file()
        return cls(directory.resolve(), str(source), dtype) if there else None

    @property
    def path(self) -> Path:
        key = repr((self.directory, self.name, self.dtype, self.gguf))
        return _root() / hashlib.sha256(key.encode()).hexdigest()[:24]

    def read(self) -> Record | None:
        """What was written down, if it is still of these files and these versions."""
        try:
            record = json_file.read(self.path / "record.json", Record, "")
        except CoralError:  # there is none, or it is damaged: then the first start is made again
            return None
        return record if record.made_with == _versions() and record.files == self._files() else None

    def tokenizer(self, record: Record, load: Callable[[], Any]) -> Any:
        """The tokenizer that was written down; `load` loads the whole of it. None: there was none."""
        if record.tokenizer is None:
            return None
        try:
            tokens = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        except Exception:  # tokenizers raises nothing narrower; the file is gone or damaged
            return load()
        return RecordedTokenizer(record.tokenizer, tokens, load)

    def write(self, target: Target) -> None:
        """Write down a target as it was loaded, for the next start. A disk that refuses is no error."""
        tokenizer = target.tokenizer
        recorded = None if tokenizer is None else TokenizerRecord.of(tokenizer)
        if tokenizer is not None and recorded is None:
            return
        record = Record(
            _versions(),
            self._files(),
            str(self.directory),
            str(target.dtype).removeprefix("torch."),
            target.facts,
            Blueprint.of(target),
            recorded,
            None if target.blocks is None else target.blocks.places,
        )
        with suppress(OSError, CoralError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_directory(self.path, ours=["*"]) as aside:
                (aside / "record.json").write_text(json.dumps(asdict(record)))
                if recorded is not None:
                    backend: Any = tokenizer
                    backend.backend_tokenizer.save(str(aside / "tokenizer.json"), pretty=False)
            _evict()

    def _files(self) -> dict[str, list[int]]:
        files = [*self.gguf, *(path for path in sorted(self.directory.iterdir()) if path.is_file())]
        stats = {str(path): path.stat() for path in files if path.name != gguf.RECORD}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


class Recorded:
    """A model as a first start wrote it down; see `source`.

    Args:
        load: loads the model itself.
    """

    def __init__(self, record: Record, load: Callable[[], Any]) -> None:
        self.facts, self.blueprint, self._load = record.facts, record.blueprint, load
        self.weights = Weights(Path(record.directory), getattr(torch, record.dtype))
        sizes = {name: size for name, (size, _) in record.files.items()}
        self.num_bytes = sum(sizes[name] for name in sizes if name.endswith(".safetensors"))
        (head,), bias = self.blueprint.head["weights"], self.blueprint.head["biases"]
        self.embedding_weight = self._parameter(self.blueprint.embedding)
        tied = head == self.blueprint.embedding
        self.head_weight = self.embedding_weight if tied else self._parameter(head)
        self.head_bias = self._parameter(bias[0]) if bias else None
        self.native: NativeForward | None = None  # the one that all its targets share
        self._outer: Any = None

    @cached_property
    def model(self) -> Any:
        model = self._load().eval().requires_grad_(False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        embedding.weight, head.weight, head.bias = self.embedding_weight, self.head_weight, self.head_bias
        self._outer = outer_weights(model)
        return model

    def _parameter(self, name: str) -> nn.Parameter:
        return nn.Parameter(self.weights[name], requires_grad=False)

    @property
    def is_loaded(self) -> bool:
        """Whether the model was asked for, and so may have been changed."""
        return "model" in vars(self)

    @property
    def is_stale(self) -> bool:
        return self.is_loaded and outer_weights(self.model) != self._outer


class Weights(Mapping[str, Tensor]):
    """The weights of a directory by their names, in a dtype; each is read when it is asked for."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self._dtype = dtype
        files = [safe_open(path, "pt") for path in sorted(directory.glob("*.safetensors"))]
        self._of = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._of[name].get_tensor(name)
        return tensor.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def clear() -> None:
    """Forget all starts."""
    shutil.rmtree(_root(), ignore_errors=True)


def _root() -> Path:
    return (user_caches() or Path(tempfile.gettempdir())) / "coral" / "starts"


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("transformers", "tokenizers")}
    return {"coral": __version__, "record": str(VERSION), **libraries}


def _evict() -> None:
    """The oldest go."""
    records = sorted(_root().glob("*/record.json"), key=lambda path: -path.stat().st_mtime)
    for record in records[_KEPT:]:
        shutil.rmtree(record.parent, ignore_errors=True)
