"""A forward of the target over a few rows in one call on the CPU: `forward.cpp`, for some families.

A plain step of a small model is some two hundred products that each take microseconds, and a compiled graph
starts all threads anew for each; here one team walks through all layers. Nothing is traced, so it stands as
soon as the weights are packed, and it takes any number of rows, of any number of sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from ctypes import CDLL, Structure, addressof, byref, c_bool, c_float, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from coral.errors import CoralError
from coral.native import sampler
from coral.native.build import SOURCES, build
from coral.native.few_rows import DTYPES, LANES, PANEL
from coral.native.packed import PackedLinear
from coral.native.packing import pack_blocks, pack_once
from coral.target.families import rotations, windowed

if TYPE_CHECKING:
    from coral.cache import KVCache
    from coral.target.target import Target
    from coral.tree import DraftTree

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""RMSNorm before attention and before a gated MLP, rotated queries and keys; with their own module names."""
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not follow the length


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
        *((name, c_void_p) for name in ("input_norm", "norm", "query_norm", "key_norm")),
        *((name, c_void_p) for name in ("attended_norm", "fed_norm")),
        *((name, _Matrix) for name in ("qkv", "o", "gate_up", "down")),
        ("rotation", c_int64),
        ("windowed", c_bool),
    )


class _Rotation(Structure):
    _fields_ = (("cos", c_void_p), ("sin", c_void_p))


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
        ("rotations", c_void_p),
        ("window", c_int64),
        ("eps", c_float),
        ("scale", c_float),
        ("embedding_scale", c_float),
        ("gelu", c_bool),
        ("normed_at_once", c_bool),
        ("narrow", c_bool),
        ("tiles", c_bool),
        ("num_sequences", c_int64),
        *((name, c_void_p) for name in ("sequences", "features", "logits")),
    )


def why_not_native(target: Target) -> str | None:
    """Why a target is not run here, as the end of a sentence; None: it is."""
    config, model = target.config, target.model
    ropes = {rope.get("rope_type", "default") for rope in rotations(config).values()}
    if {weight.device.type for weight in model.parameters()} != {"cpu"}:
        return "it is not on the CPU"
    if config.model_type not in FAMILIES:
        return f"its family, {config.model_type}, has no native forward"
    if not type(model).__module__.startswith("transformers.models."):
        return "its code is not transformers' own"
    if odd := ropes - {*_FIXED_ROPE}:
        return f"its rotary frequencies ({', '.join(sorted(odd))}) follow the length of the text"
    if config._attn_implementation == "eager" and target.dtype != torch.float32:
        return "eager attention rounds within; use sdpa"
    if _activation(config) not in _ACTIVATIONS:
        return f"its activation is {_activation(config)}"
    if target.dtype not in DTYPES or any(weight.dtype != target.dtype for weight in model.parameters()):
        return f"its weights are in {target.precision} or in several dtypes; use float32 or bfloat16"
    return _why_not_its_layers(target) or _why_not_here(target)


def _linears(target: Target) -> list[Any]:
    """Every layer that multiplies with a matrix, the LM head included."""
    modules = target.decoder.layers.modules()
    found = [m for m in modules if m._parameters.get("weight") is not None and m.weight.dim() == 2]
    return [*found, target.model.get_output_embeddings()]


def _why_not_its_layers(target: Target) -> str | None:
    """The same for the modules, which may have been changed since the model was made."""
    decoder, linears = target.decoder, _linears(target)
    head_size = decoder.layers[0].self_attn.head_dim
    if any(type(linear) not in (nn.Linear, PackedLinear) for linear in linears):
        return "some of its layers are not plain linear ones"
    if any(size % LANES for size in (head_size, *(linear.in_features for linear in linears))):
        return f"its sizes are no multiples of {LANES}"
    if any(2 * len(frequencies) != head_size for frequencies in decoder.rotary_emb.buffers()):
        return "it rotates a part of each head"
    sizes = {layer.self_attn.k_proj.out_features for layer in decoder.layers}
    if len(sizes) > 1 or not all(_is_whole(layer, target.hidden_size, head_size) for layer in decoder.layers):
        return "the sizes of its layers do not go together"
    return None if target.embedding_weight.is_contiguous() else "its embedding is not one block of memory"


def _why_not_here(target: Target) -> str | None:
    """The same for this machine."""
    needed = 1.2 * sum(linear.weight.nbytes for linear in _linears(target))
    if psutil.virtual_memory().available <= needed:
        return f"a packed copy of its weights takes {needed / 1e9:.1f} GB, more than is free"
    return None if _library() else "there is no C++ compiler, or none that knows this processor's vectors"


def _is_whole(layer: Any, hidden: int, head_size: int) -> bool:
    """Whether the sizes of a layer go together, which may have been changed since it was made."""
    a, mlp = layer.self_attn, layer.mlp
    q, kv, inner = a.q_proj.out_features, a.k_proj.out_features, mlp.down_proj.in_features
    outputs = (a.v_proj, kv), (a.o_proj, hidden), (mlp.gate_proj, inner), (mlp.up_proj, inner)
    inputs = *((each, hidden) for each in (a.q_proj, a.k_proj, a.v_proj)), (a.o_proj, q)
    return (
        q % head_size == kv % head_size == q % kv == 0
        and all(each.out_features == size for each, size in (*outputs, (mlp.down_proj, hidden)))
        and all(each.in_features == size for each, size in (*inputs, (mlp.gate_proj, hidden)))
        and mlp.up_proj.in_features == hidden
    )


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_act", None) or config.hidden_activation)


def _library() -> CDLL | None:
    return build(SOURCES / "forward.cpp")


def _tiles() -> bool:
    """Whether this processor has a matrix unit for bfloat16 (AMX) that the system lets this process use."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


class NativeForward:
    """Verifies trees with packed copies of a target's weights as they are now; see `why_not_native`."""

    def __init__(self, library: CDLL, target: Target) -> None:
        decoder, config = target.decoder, target.config
        attention = decoder.layers[0].self_attn
        sampler.load()  # else sampling would take as long as the forward
        self._library, self._run, self._decoder = library, library.coral_forward, decoder
        self._owned: list[Tensor] = [target.embedding_weight]  # what the pointers below lead to
        self._blocks, parameters = target.blocks, target.model.named_parameters()
        self._names = {id(parameter): name for name, parameter in parameters}
        self._met = Counter[Any]()
        self._gemma = config.model_type == "gemma3_text"
        kinds = config.layer_types if self._gemma else [None] * len(decoder.layers)
        self._turns = sorted(set(kinds))  # the kinds of layers that have a rotation of their own
        layers = []
        for layer, kind, short in zip(decoder.layers, kinds, windowed(config), strict=True):
            a, mlp = layer.self_attn, layer.mlp
            around = [None, layer.post_attention_layernorm, None]  # after attention, before and after the MLP
            if self._gemma:
                around = [around[1], layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm]
            head_norms = (getattr(a, "q_norm", None), getattr(a, "k_norm", None))
            norms = (layer.input_layernorm, around[1], *head_norms, around[0], around[2])
            layers.append(
                _Layer(
                    *(None if norm is None else self._norm(norm) for norm in norms),
                    self._matrix([a.q_proj, a.k_proj, a.v_proj]),
                    self._matrix([a.o_proj]),
                    self._matrix([mlp.gate_proj, mlp.up_proj], interleaved=True),
                    self._matrix([mlp.down_proj]),
                    rotation=self._turns.index(kind),
                    windowed=short,
                )
            )
        self._layers = (_Layer * len(layers))(*layers)
        head_size = attention.head_dim
        kv_heads = attention.k_proj.out_features // head_size
        self._no_rows = target.embedding_weight.new_empty(1, kv_heads, 0, head_size)
        self._vocab_size = target.vocab_size
        self._job = _Job(
            hidden=target.hidden_size,
            heads=attention.q_proj.out_features // head_size,
            kv_heads=kv_heads,
            head_size=head_size,
            num_layers=len(layers),
            layers=addressof(self._layers),
            embedding=target.embedding_weight.data_ptr(),
            norm=self._norm(decoder.norm),
            head=self._matrix([target.model.get_output_embeddings()]),
            eps=config.rms_norm_eps,
            scale=attention.scaling,
            window=target.window or 0,
            embedding_scale=self._embedding_scale(target),
            gelu=_activation(config) != "silu",
            normed_at_once=self._gemma,
            narrow=target.dtype == torch.bfloat16,
            tiles=target.dtype == torch.bfloat16 and _tiles(),
        )
        self._rotate(0)

    @classmethod
    def of(cls, target: Target) -> NativeForward:
        """Raises CoralError with the reason where a target is not run natively."""
        library, reason = _library(), why_not_native(target)
        if reason or library is None:
            raise CoralError(f"{target.name} cannot run natively: {reason}; use another dtype or backend.")
        return cls(library, target)

    def verify(
        self, caches: Sequence[KVCache], trees: Sequence[DraftTree], wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [N, V] and, if wanted, features [N, h] of all nodes, whose rows the caches take in."""
        nodes = [tree.lists[:2] for tree in trees]
        logits = self._no_rows.new_empty(sum(map(len, trees)), self._vocab_size)
        features = self._rows(caches, nodes, logits)
        return logits, features if wanted else None

    def read(self, cache: KVCache, tokens: Sequence[int]) -> Tensor:
        """Features [n, h] of tokens behind what the cache holds, which takes their rows."""
        return self._rows([cache], [(tokens, range(-1, len(tokens) - 1))])

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
        kinds = [() if kind is None else (kind,) for kind in self._turns]
        positions = torch.arange(length)[None]
        tables = [self._decoder.rotary_emb(self._no_rows, positions, *kind) for kind in kinds]
        self._tables = [[table[0].float().contiguous() for table in pair] for pair in tables]
        pairs = [_Rotation(*(table.data_ptr() for table in pair)) for pair in self._tables]
        self._rotations, self._rotated = (_Rotation * len(pairs))(*pairs), length
        self._job.rotations = addressof(self._rotations)

    def _matrix(self, linears: list[Any], interleaved: bool = False) -> _Matrix:
        """One product of layers that read the same rows; interleaved: a panel of each in turn."""

        def joined(parts: list[Tensor]) -> Tensor:
            if not interleaved:
                return torch.cat(parts)
            return torch.stack([part.unflatten(0, (-1, PANEL)) for part in parts], 1).flatten(0, 2)

        weights = [linear.weight.detach() for linear in linears]
        if self._blocks is None:
            packed = pack_once(self._library, weights, interleaved, self._met)
            kind = int(packed.dtype == torch.bfloat16)
        else:
            names = [self._names[id(linear.weight)] for linear in linears]
            kind, packed = pack_blocks(self._library, *self._blocks.packed(names), interleaved)
        self._owned.append(packed)
        return _Matrix(
            panels=packed.data_ptr(),
            inputs=weights[0].shape[1],
            outputs=sum(map(len, weights)),
            kind=kind,
            bias=None if linears[0].bias is None else self._vector(joined([each.bias for each in linears])),
        )

    def _norm(self, norm: Any) -> int:
        """What normalised rows are multiplied by: with Gemma 1 + the weight, in float32."""
        return self._vector(1 + norm.weight.float() if self._gemma else norm.weight)

    def _embedding_scale(self, target: Target) -> float:
        """What the model multiplies rows of its embedding by, rounded as it rounds it."""
        scale = getattr(target.model.get_input_embeddings(), "embed_scale", None)
        return 1.0 if scale is None else float(scale.to(target.dtype))

    def _vector(self, values: Tensor) -> int:
        self._owned.append(values.detach().float().contiguous())
        return self._owned[-1].data_ptr()
