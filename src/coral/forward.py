"""A forward of the target over a few rows in one call on the CPU: `forward.cpp`, for some families.

A plain step of a small model is some two hundred products that each take microseconds, and a compiled graph
starts all threads anew for each; here one team walks through all layers. Nothing is traced, so it stands as
soon as the weights are packed, and it takes any number of rows, of any number of sequences.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from ctypes import CDLL, Structure, addressof, byref, c_bool, c_float, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from coral import sampler
from coral.cpp import build
from coral.few_rows import DTYPES, LANES, MOST_ROWS, PANEL, pack_once
from coral.packed import PackedLinear

if TYPE_CHECKING:
    from coral.cache import KVCache
    from coral.decoding.state import State
    from coral.decoding.tree import DraftTree
    from coral.target import Target

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""RMSNorm before attention and before a gated SiLU, rotated queries and keys; with their own module names."""
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not follow the length


class _Matrix(Structure):
    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("narrow", c_bool),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "norm", "query_norm", "key_norm")),
        *((name, _Matrix) for name in ("qkv", "o", "gate_up", "down")),
    )


class _Sequence(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("length", "count", "capacity")),
        *((name, c_void_p) for name in ("ids", "parents", "storage")),
    )


class _Job(Structure):
    """As in forward.cpp, field by field."""

    _fields_ = (
        *((name, c_int64) for name in ("threads", "hidden", "heads", "kv_heads", "head_size", "num_layers")),
        *((name, c_void_p) for name in ("layers", "embedding", "norm")),
        ("head", _Matrix),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("eps", c_float),
        ("scale", c_float),
        ("narrow", c_bool),
        ("tiles", c_bool),
        ("num_sequences", c_int64),
        *((name, c_void_p) for name in ("sequences", "features", "logits")),
    )


def suits(target: Target) -> bool:
    """Whether a target can be run here. Not so: another family, or code that is not transformers' own; a
    sliding window, or rotary frequencies that follow the length or turn a part of a head; eager attention;
    another device, number format or activation; sizes that do not fill vectors; layers that are not plain
    linear ones; no memory for copies; no C++ compiler, or one that does not know this processor's vectors.
    """
    config, decoder = target.config, target.decoder
    rope = getattr(config, "rope_parameters", None) or {}
    if (
        config.model_type not in FAMILIES
        or not type(target.model).__module__.startswith("transformers.models.")
        or target.window is not None
        or rope.get("rope_type", "default") not in _FIXED_ROPE
        or config._attn_implementation == "eager"
        or config.hidden_act != "silu"
    ):
        return False
    weights = [*target.model.parameters()]
    linears = [
        *(
            module
            for module in decoder.layers.modules()
            if module._parameters.get("weight") is not None and module.weight.dim() == 2
        ),
        target.model.get_output_embeddings(),
    ]
    head_size = decoder.layers[0].self_attn.head_dim
    return (
        all(weight.device.type == "cpu" and weight.dtype == target.dtype for weight in weights)
        and target.dtype in DTYPES
        and all(type(linear) in (nn.Linear, PackedLinear) for linear in linears)
        and all(size % LANES == 0 for size in (head_size, *(linear.in_features for linear in linears)))
        and 2 * len(decoder.rotary_emb.inv_freq) == head_size
        and target.embedding_weight.is_contiguous()
        and psutil.virtual_memory().available > 1.2 * sum(linear.weight.nbytes for linear in linears)
        and _library() is not None
    )


def _library() -> CDLL | None:
    return build(Path(__file__).with_suffix(".cpp"))


def _tiles() -> bool:
    """Whether this processor has a matrix unit for bfloat16 (AMX) that the system lets this process use."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


class NativeForward:
    """Verifies trees with packed copies of a target's weights as they are now; see `suits`."""

    def __init__(self, library: CDLL, target: Target) -> None:
        decoder, config = target.decoder, target.config
        attention = decoder.layers[0].self_attn
        sampler.load()  # else sampling would take as long as the forward
        self._run, self._decoder = library.coral_forward, decoder
        self._owned: list[Tensor] = [target.embedding_weight]  # what the pointers below lead to
        self._met = Counter[Any]()
        layers = []
        for layer in decoder.layers:
            a, mlp = layer.self_attn, layer.mlp
            norms = (layer.input_layernorm, layer.post_attention_layernorm)
            head_norms = (getattr(a, "q_norm", None), getattr(a, "k_norm", None))
            layers.append(
                _Layer(
                    *(None if norm is None else self._vector(norm.weight) for norm in norms + head_norms),
                    self._matrix([a.q_proj, a.k_proj, a.v_proj]),
                    self._matrix([a.o_proj]),
                    self._matrix([mlp.gate_proj, mlp.up_proj], interleaved=True),
                    self._matrix([mlp.down_proj]),
                )
            )
        self._layers = (_Layer * len(layers))(*layers)
        head_size = attention.head_dim
        kv_heads = attention.k_proj.out_features // head_size
        self._no_rows = target.embedding_weight.new_empty(1, kv_heads, 0, head_size)
        self._vocab_size = target.vocab_size
        # Of many rows, too: not with vectors of eight numbers.
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        self._most_rows = sys.maxsize if wide else MOST_ROWS
        self._job = _Job(
            hidden=target.hidden_size,
            heads=attention.q_proj.out_features // head_size,
            kv_heads=kv_heads,
            head_size=head_size,
            num_layers=len(layers),
            layers=addressof(self._layers),
            embedding=target.embedding_weight.data_ptr(),
            norm=self._vector(decoder.norm.weight),
            head=self._matrix([target.model.get_output_embeddings()]),
            eps=config.rms_norm_eps,
            scale=attention.scaling,
            narrow=target.dtype == torch.bfloat16,
            tiles=target.dtype == torch.bfloat16 and _tiles(),
        )
        self._rotate(0)

    @classmethod
    def of(cls, target: Target) -> NativeForward | None:
        """None for a target that it does not suit."""
        library = _library() if suits(target) else None
        return None if library is None else cls(library, target)

    def verify(
        self, states: Sequence[State], trees: Sequence[DraftTree]
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """As `Target.verify`, for trees on the CPU; None: as in `read`."""
        counts = [len(tree) for tree in trees]
        if sum(counts) > self._most_rows:
            return None
        nodes = [tree.lists[:2] for tree in trees]
        logits = self._no_rows.new_empty(sum(counts), self._vocab_size)
        features = self._rows([state.cache for state in states], nodes, logits)
        if len(counts) == 1:  # two calls of torch less in a cycle
            return [logits], [features]
        return list(logits.split(counts)), list(features.split(counts))

    def read(self, cache: KVCache, tokens: Sequence[int]) -> Tensor | None:
        """Features [n, h] of tokens behind what the cache holds, which takes their rows; None: there are more
        than `few_rows.MOST_ROWS`, and torch's forward is faster.
        """
        n = len(tokens)
        if n > self._most_rows:
            return None
        return self._rows([cache], [(tokens, range(-1, n - 1))])

    def _rows(
        self,
        caches: Sequence[KVCache],
        nodes: Sequence[tuple[Sequence[int], Sequence[int]]],
        logits: Tensor | None = None,
    ) -> Tensor:
        """Features [n, h] of ids and parents, a tree of each sequence, and, where asked for, their logits."""
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
        features = self._no_rows.new_empty(sum(len(ids) for ids, _ in nodes), self._job.hidden)
        job = _Job.from_buffer_copy(self._job)
        job.threads = torch.get_num_threads()
        job.num_sequences, job.sequences = len(caches), addressof(sequences)
        job.features, job.logits = features.data_ptr(), None if logits is None else logits.data_ptr()
        self._run(byref(job))
        for cache, sequence in zip(caches, sequences, strict=True):
            cache.set_length(sequence.length + sequence.count)
        return features

    def _rotate(self, length: int) -> None:
        """Have cos, sin [length, d] float32 of all positions, rounded as the model rounds them."""
        tables = self._decoder.rotary_emb(self._no_rows, torch.arange(length)[None])
        self._rotation, self._rotated = [table[0].float().contiguous() for table in tables], length
        self._job.cos, self._job.sin = (table.data_ptr() for table in self._rotation)

    def _matrix(self, linears: list[Any], interleaved: bool = False) -> _Matrix:
        """One product of layers that read the same rows; interleaved: a panel of each in turn."""

        def joined(parts: list[Tensor]) -> Tensor:
            if not interleaved:
                return torch.cat(parts)
            return torch.stack([part.unflatten(0, (-1, PANEL)) for part in parts], 1).flatten(0, 2)

        weight = joined([linear.weight.detach() for linear in linears])
        self._owned.append(pack_once(weight, self._met))
        return _Matrix(
            panels=self._owned[-1].data_ptr(),
            inputs=weight.shape[1],
            outputs=len(weight),
            narrow=self._owned[-1].dtype == torch.bfloat16,
            bias=None if linears[0].bias is None else self._vector(joined([each.bias for each in linears])),
        )

    def _vector(self, values: Tensor) -> int:
        self._owned.append(values.detach().float().contiguous())
        return self._owned[-1].data_ptr()
