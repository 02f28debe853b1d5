"""A forward of the target over a few rows in one call on the CPU: `forward.cpp`, for some families.

A plain step of a small model is some two hundred products that each take microseconds, and torch starts all
threads anew for each; here one team walks through all layers. It stands as soon as the weights are packed,
and it takes any number of rows, of any number of sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from ctypes import CDLL, Structure, addressof, byref, c_bool, c_float, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from coral.device import has_wide_vectors
from coral.errors import CoralError
from coral.native import sampler
from coral.native.build import SOURCES, build
from coral.native.packing import DTYPES, PANEL, pack, pack_blocks, pack_once
from coral.target.blueprint import Blueprint, Matrix, linears, why_not
from coral.target.second_start import Recorded

if TYPE_CHECKING:
    from coral.cache import KVCache
    from coral.target.gguf.blocks import Blocks
    from coral.target.target import Target
    from coral.tree import DraftTree

_NORMS = ("input_norm", "norm", "query_norm", "key_norm", "attended_norm", "fed_norm")
_MATRICES = ("qkv", "o", "gate_up", "down")
_SIZES = ("hidden", "heads", "kv_heads", "head_size")
_ROUNDS = ("normed_at_once", "normed_together", "rotated_at_once")


class _Matrix(Structure):
    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("kind", c_int64),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in _NORMS),
        *((name, _Matrix) for name in _MATRICES),
        ("rotation", c_int64),
        ("windowed", c_bool),
    )


class _Rotation(Structure):
    _fields_ = (("cos", c_void_p), ("sin", c_void_p), ("size", c_int64))


class _Sequence(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("length", "count", "capacity")),
        *((name, c_void_p) for name in ("ids", "parents", "storage")),
    )


class _Job(Structure):
    """As in forward.cpp, field by field."""

    _fields_ = (
        *((name, c_int64) for name in ("threads", *_SIZES, "num_layers")),
        *((name, c_void_p) for name in ("layers", "embedding", "norm")),
        ("head", _Matrix),
        ("rotations", c_void_p),
        ("window", c_int64),
        ("eps", c_float),
        ("scale", c_float),
        ("embedding_scale", c_float),
        ("gelu", c_bool),
        *((name, c_bool) for name in _ROUNDS),
        ("narrow", c_bool),
        ("unit", c_int64),
        ("num_sequences", c_int64),
        *((name, c_void_p) for name in ("sequences", "features", "logits")),
        ("num_taps", c_int64),
        *((name, c_void_p) for name in ("taps", "entering")),
    )


def why_not_native(target: Target) -> str | None:
    """Why a target is not run here, as the end of a sentence; None: it is."""
    if isinstance(target.source, Recorded) and not target.source.is_loaded:
        return _why_not_here(target.source.num_bytes)
    bytes_of = (linear.weight.nbytes for linear in linears(target))
    return why_not_anywhere(target) or _why_not_here(sum(bytes_of))


def why_not_anywhere(target: Target) -> str | None:
    """The same for a model, whatever the machine."""
    weights = [*target.model.parameters()]
    if {weight.device.type for weight in weights} != {"cpu"}:
        return "it is not on the CPU"
    if target.config._attn_implementation == "eager" and target.dtype != torch.float32:
        return "eager attention rounds within; use sdpa"
    if target.dtype not in DTYPES or any(weight.dtype != target.dtype for weight in weights):
        return f"its weights are in {target.precision} or in several dtypes; use float32 or bfloat16"
    return why_not(target)


def _why_not_here(num_bytes: int) -> str | None:
    """The same for this machine and weights of so many bytes."""
    needed = 1.2 * num_bytes
    if psutil.virtual_memory().available <= needed:
        return f"a packed copy of its weights takes {needed / 1e9:.1f} GB, more than is free"
    return None if _library() else "there is no C++ compiler, or none that knows this processor's vectors"


def _library() -> CDLL | None:
    return build(SOURCES / "forward.cpp")


def _unit() -> int:
    """What multiplies bfloat16 here, as forward.cpp counts it: 2 is a matrix unit (AMX) that the system lets
    this process use, 1 vectors that multiply two numbers at once, 0 those that do not.
    """
    if not has_wide_vectors():
        return 0
    if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
        return 2
    return int(torch.cpu._is_avx512_bf16_supported())


class _Packer:
    """Weights by their names, laid out as forward.cpp reads them; `owned` is what its pointers lead to."""

    def __init__(
        self, library: CDLL, weights: Mapping[str, Tensor], blocks: Blocks | None, norm_offset: float
    ) -> None:
        self.owned: list[Tensor] = []
        self._library, self._weights, self._blocks, self._offset = library, weights, blocks, norm_offset
        self._met = Counter[Any]()

    def norm(self, name: str | None) -> int | None:
        """What normalised rows are multiplied by, in float32."""
        if name is None:
            return None
        weight = self._weights[name].float()
        return self._vector(self._offset + weight if self._offset else weight)

    def matrix(self, matrix: Matrix, interleaved: bool = False) -> _Matrix:
        """One product of matrices that are multiplied with the same rows; interleaved: a panel of each in
        turn, of the halves where they are one tensor.
        """

        def halved(parts: list[Tensor]) -> list[Tensor]:
            return [*parts[0].chunk(2)] if interleaved and len(parts) == 1 else parts

        if self._blocks is None:
            weights = halved([self._weights[name].detach() for name in matrix["weights"]])
            kept = isinstance(self._weights, dict)  # by a model, which others may pack, too
            packed = (
                pack_once(self._library, weights, interleaved, self._met)
                if kept
                else pack(self._library, weights, interleaved)
            )
            kind, inputs = int(packed.dtype == torch.bfloat16), weights[0].shape[1]
        else:
            stored, weights = self._blocks.packed(matrix["weights"])
            kind, packed = pack_blocks(self._library, stored, halved(weights), interleaved)
            inputs = self._blocks.columns(matrix["weights"][0])
        self.owned.append(packed)
        biases = halved([self._weights[name] for name in matrix["biases"]])
        if biases and interleaved:
            biases = [torch.stack([bias.unflatten(0, (-1, PANEL)) for bias in biases], 1).flatten()]
        return _Matrix(
            panels=packed.data_ptr(),
            inputs=inputs,
            outputs=sum(map(len, weights)),
            kind=kind,
            bias=self._vector(torch.cat(biases)) if biases else None,
        )

    def _vector(self, values: Tensor) -> int:
        self.owned.append(values.detach().float().contiguous())
        return self.owned[-1].data_ptr()


class NativeForward:
    """Verifies trees with packed copies of a model's weights as they are now.

    Args:
        weights: by the names of the blueprint, all of `dtype`, float32 or bfloat16.
        blocks: those of the model's GGUF file, with which is multiplied instead.
    """

    def __init__(
        self,
        library: CDLL,
        blueprint: Blueprint,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        blocks: Blocks | None = None,
    ) -> None:
        sampler.load()  # else sampling would take as long as the forward
        self._run, self._turns = library.coral_forward, blueprint.rotations
        self._table_dtype = torch.float32 if blueprint.rotated_at_once else dtype
        packer = _Packer(library, weights, blocks, blueprint.norm_offset)
        layers = [
            _Layer(
                *(packer.norm(layer["norms"].get(name)) for name in _NORMS),
                *(
                    packer.matrix(layer["matrices"][name], interleaved=name == "gate_up")
                    for name in _MATRICES
                ),
                layer["rotation"],
                layer["windowed"],
            )
            for layer in blueprint.layers
        ]
        self._layers, embedding = (_Layer * len(layers))(*layers), weights[blueprint.embedding]
        self._owned = packer.owned, embedding  # what the pointers lead to
        self._no_rows = torch.empty(1, blueprint.kv_heads, 0, blueprint.head_size, dtype=dtype)
        self._vocab_size = len(embedding)
        self._job = _Job(
            **{name: getattr(blueprint, name) for name in (*_SIZES, *_ROUNDS, "eps", "scale")},
            num_layers=len(layers),
            layers=addressof(self._layers),
            embedding=embedding.data_ptr(),
            norm=packer.norm(blueprint.norm),
            head=packer.matrix(blueprint.head),
            window=blueprint.window or 0,
            embedding_scale=float(torch.tensor(blueprint.embedding_scale).to(dtype)),
            gelu=blueprint.activation == "gelu",
            narrow=dtype == torch.bfloat16,
            unit=_unit() if dtype == torch.bfloat16 else 0,
        )
        self._rotate(0)

    @classmethod
    def of(cls, target: Target) -> NativeForward:
        """Raises CoralError with the reason where a target is not run natively."""
        library, reason = _library(), why_not_native(target)
        if reason or library is None:
            raise CoralError(f"{target.name} cannot run natively: {reason}; use another dtype or backend.")
        source = target.source
        if isinstance(source, Recorded) and not source.is_loaded:
            source.native = source.native or cls(
                library, source.blueprint, source.weights, target.dtype, target.blocks
            )
            return source.native
        weights = dict(source.model.named_parameters())
        return cls(library, Blueprint.of(target), weights, target.dtype, target.blocks)

    def verify(
        self, caches: Sequence[KVCache], trees: Sequence[DraftTree], layers: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [N, V] and the states of all nodes, whose rows the caches take in; see `Target.verify`."""
        nodes = [tree.lists[:2] for tree in trees]
        logits = self._no_rows.new_empty(sum(map(len, trees)), self._vocab_size)
        return logits, self._rows(caches, nodes, layers, logits)

    def read(self, cache: KVCache, tokens: Sequence[int], layers: tuple[int, ...]) -> Tensor | None:
        """See `Target.read`."""
        return self._rows([cache], [(tokens, range(-1, len(tokens) - 1))], layers)

    def _rows(
        self,
        caches: Sequence[KVCache],
        nodes: Sequence[tuple[Sequence[int], Sequence[int]]],
        layers: tuple[int, ...],
        logits: Tensor | None = None,
    ) -> Tensor | None:
        """States [n, len(layers) * h] of ids and parents, a tree of each sequence, and, where asked for,
        their logits; None: no layers.
        """
        inner = [layer for layer in layers if layer != -1]
        if inner and not 0 <= min(inner) <= max(inner) < len(self._layers):
            raise IndexError(f"the model has {len(self._layers)} layers, of which {inner} are wanted")
        sequences = (_Sequence * len(caches))()
        numbers = [[(c_int64 * len(part))(*part) for part in tree] for tree in nodes]
        for sequence, cache, (ids, parents) in zip(sequences, caches, numbers, strict=True):
            cache.reserve(len(ids), self._no_rows)
            if self._rotated < cache.capacity:
                self._rotate(cache.capacity)
            storage = cache.buffer.whole
            assert storage is not None
            sequence.length, sequence.count, sequence.capacity = cache.length, len(ids), cache.capacity
            sequence.ids, sequence.parents = addressof(ids), addressof(parents)
            sequence.storage = storage.data_ptr()
        count, hidden = sum(len(ids) for ids, _ in nodes), self._job.hidden
        features = self._no_rows.new_empty(count, hidden)
        entering, taps = features.new_empty(count, len(inner) * hidden), (c_int64 * len(inner))(*inner)
        job = _Job.from_buffer_copy(self._job)
        job.threads = torch.get_num_threads()
        job.num_sequences, job.sequences = len(caches), addressof(sequences)
        job.features, job.logits = features.data_ptr(), None if logits is None else logits.data_ptr()
        job.num_taps, job.taps, job.entering = len(inner), addressof(taps), entering.data_ptr()
        self._run(byref(job))
        for cache, sequence in zip(caches, sequences, strict=True):
            cache.set_length(sequence.length + sequence.count)
        if -1 not in layers:
            return entering if layers else None
        if not inner:
            return features
        states = iter(entering.split(hidden, -1))
        return torch.cat([features if layer == -1 else next(states) for layer in layers], -1)

    def _rotate(self, length: int) -> None:
        """Have cos, sin [length, d] float32 of all positions, rounded as the model rounds them."""
        positions, dtype = torch.arange(length)[:, None].float(), self._table_dtype
        self._tables = []
        for rotation in self._turns:
            half = positions * torch.tensor(rotation["frequencies"])
            angles = torch.cat((half, half), -1)
            tables = (table * rotation["scaling"] for table in (angles.cos(), angles.sin()))
            self._tables.append([table.to(dtype).float() for table in tables])
        pairs = [_Rotation(*(t.data_ptr() for t in pair), pair[0].shape[1]) for pair in self._tables]
        self._rotations, self._rotated = (_Rotation * len(pairs))(*pairs), length
        self._job.rotations = addressof(self._rotations)
