"""Whole draft trees in one call on the CPU: `native/draft.cpp`, the fast twin of `propose.py`'s levels.

A draft step of a small tree is some fifteen small products, and calling them one by one costs more than they
do. Here one team of threads grows all levels of the trees of all texts in one call; each is, bit for bit, the
tree that would grow alone. Weights are bytes with a scale of each output, rows integers of 16 bits: a quarter
of float32's bytes, for a rounding that drafts hardly show.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, Structure, addressof, byref, c_bool, c_float, c_int64, c_uint64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coral.cache import KVCache
from coral.decoding.state import State
from coral.drafters.feature.network import Drafter, DraftLayer
from coral.drafters.heads.rows import Table
from coral.native.build import SOURCES, build
from coral.native.memory import weights_like
from coral.native.packing import DTYPES, LANES
from coral.target.target import Target
from coral.tree import DraftTree, TreeSize


class _Numbers(Structure):
    _fields_ = (("data", c_void_p), ("wide", c_bool))


class _Matrix(Structure):
    _fields_ = (("weights", _Numbers), ("scales", c_void_p))


class _Layer(Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("norm", c_void_p),
        *((name, _Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
    )


class _Head(Structure):
    _fields_ = (("rows", _Matrix), ("bias", c_void_p), ("ids", c_void_p), ("candidates", c_int64))


class _Text(Structure):
    _fields_ = (
        ("cache", _Numbers),
        *((name, c_int64) for name in ("capacity", "length", "num_rows")),
        ("ids", c_void_p),
        ("features", _Numbers),
        *((name, c_int64) for name in ("head", "max_depth", "num_nodes", "pool")),
        ("temperature", c_float),
        ("stream", c_uint64),
        *((name, c_void_p) for name in ("tree_ids", "tree_parents", "tree_scores")),
        ("size", c_int64),
        ("depth", c_int64),
    )


class _Job(Structure):
    """As in draft.cpp, field by field; so are the other structures."""

    _fields_ = (
        *((name, c_int64) for name in ("threads", "hidden", "heads", "kv_heads", "head_size", "inner")),
        *((name, c_int64) for name in ("num_layers", "num_embedded")),
        ("layers", c_void_p),
        ("embedding", _Numbers),
        ("embedding_fc", _Matrix),
        ("feature_fc", _Matrix),
        *((name, c_void_p) for name in ("fc_bias", "cos", "sin")),
        ("eps", c_float),
        ("embedding_scale", c_float),
        ("feed_back_normalised", c_bool),
        ("tables", c_void_p),
        *((name, c_int64) for name in ("num_tables", "top_k")),
        ("min_gain", c_float),
        ("num_texts", c_int64),
        ("texts", c_void_p),
    )


class Seed(NamedTuple):
    """What the tree of one sequence grows from; of the sequence one row at least is unread.

    cache: the drafter's, of the rows in front of the unread ones.
    tree_size: with one level at least; `top_k` and `min_gain` are those of all that grow together.
    pool: ids of a node that compete after the sampler's noise is added; 0: it is not.
    """

    state: State
    cache: KVCache
    table: Table
    tree_size: TreeSize
    pool: int


class NativeDrafter:
    """Grows trees with a drafter on the CPU, with copies of its weights as they are now; see `of`."""

    def __init__(self, library: CDLL, drafter: Drafter, target: Target) -> None:
        config, layers = drafter.config, []
        self.drafter = drafter
        self._run = library.coral_grow
        self._owned = [target.embedding_weight]  # what the pointers below lead to
        for layer in drafter.layers:
            assert isinstance(layer, DraftLayer)
            a, mlp = layer.self_attn, layer.mlp
            first = self._vector(layer.input_layernorm.weight) if layer.index > 0 else None
            norm = self._vector(layer.post_attention_layernorm.weight)
            linears = a.q_proj, a.k_proj, a.v_proj, a.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
            layers.append(_Layer(first, norm, *(self._matrix(linear.weight) for linear in linears)))
        self._layers = (_Layer * len(layers))(*layers)
        embedding_fc, feature_fc = (self._matrix(half) for half in drafter.fc.weight.chunk(2, dim=1))
        bias = drafter.fc.bias
        self._job = _Job(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=config.head_dim,
            inner=config.intermediate_size,
            num_layers=len(layers),
            num_embedded=target.vocab_size,
            layers=addressof(self._layers),
            embedding=_numbers(target.embedding_weight),
            embedding_fc=embedding_fc,
            feature_fc=feature_fc,
            fc_bias=None if bias is None else self._vector(bias),
            eps=config.rms_norm_eps,
            embedding_scale=config.embedding_scale,
            feed_back_normalised=config.normalised_feedback,
        )
        self._head: tuple[Tensor | None, _Matrix] = None, _Matrix()  # the last fixed rows, and as bytes
        self._no_rows = drafter.fc.weight.new_empty(1, config.num_key_value_heads, 0, config.head_dim)
        self._rotate(0)
        self._num_bytes = sum(weight.nbytes for weight in self._owned[1:])

    @classmethod
    def of(cls, drafter: Drafter, target: Target) -> NativeDrafter | None:
        """None where there can be none: a drafter of another make, device, number format or activation, sizes
        that do not fill vectors, no C++ compiler, or one that does not know this processor's vectors.
        """
        if type(drafter) is not Drafter:
            return None
        config = drafter.config
        attended = config.num_attention_heads * config.head_dim
        inputs = (config.hidden_size, config.intermediate_size, attended)
        weights = [*drafter.parameters(), target.embedding_weight, target.head_weight]
        if (
            any(weight.device.type != "cpu" for weight in weights)
            or any(weight.dtype not in DTYPES for weight in weights)
            or config.hidden_act != "silu"
            or any(size % (2 * LANES) for size in inputs)
            or config.head_dim % LANES
        ):
            return None
        library = build(SOURCES / "draft.cpp")
        return None if library is None else cls(library, drafter, target)

    def num_bytes(self, table: Table) -> int:
        """Bytes of weights that a level reads, with this head."""
        return self._num_bytes + (table.rows.numel() if table.fixed else table.rows.nbytes)

    def grow(self, seeds: Sequence[Seed]) -> list[DraftTree]:
        """The trees of some sequences, whose caches then hold what was unread, too."""
        texts, tables = (_Text * len(seeds))(), dict[int, _Head]()
        made = [self._begin(*each, tables) for each in zip(texts, seeds, strict=True)]
        heads = (_Head * len(tables))(*tables.values())
        job = _Job.from_buffer_copy(self._job)  # after the last rotation
        job.threads, size = torch.get_num_threads(), seeds[0].tree_size
        job.top_k, job.min_gain = size.top_k, size.min_gain
        job.tables, job.num_tables = addressof(heads), len(heads)
        job.texts, job.num_texts = addressof(texts), len(texts)
        self._run(byref(job))
        for text, seed in zip(texts, seeds, strict=True):
            seed.cache.set_length(text.length + text.num_rows)
        return [
            DraftTree(ids[: text.size], parents[: text.size], scores[: text.size], text.depth)
            for text, (_, ids, parents, scores) in zip(texts, made, strict=True)
        ]

    def _begin(self, text: _Text, seed: Seed, tables: dict[int, _Head]) -> tuple[Any, ...]:
        """Fill in what is asked of a text, and its head among `tables`, by their addresses.

        Returns:
            What is to be kept meanwhile, and the tree's ids, parents and scores, to be filled in.
        """
        state, cache, table, tree_size, pool = seed
        features, n = state.unread.features.contiguous(), len(state.unread_tokens)
        cache.reserve(n + tree_size.top_k * tree_size.max_depth, self._no_rows)
        assert cache.buffer.whole is not None
        if self._rotated < cache.capacity:
            self._rotate(cache.capacity)
        widest = tree_size.top_k * (1 + (tree_size.max_depth - 1) * tree_size.top_k)
        most = min(tree_size.num_nodes, widest)
        ids = (c_int64 * n)(*state.unread_tokens)
        tree_ids, parents = (c_int64 * (most + 1))(), (c_int64 * (most + 1))()
        scores = (c_float * (most + 1))()
        kept, at = (features, ids, table), table.rows.data_ptr()
        if at not in tables:
            tables[at] = _Head(self._scored(table), _data(table.bias), _data(table.ids), len(table.rows))
        text.head = [*tables].index(at)
        text.cache, text.capacity, text.length = _numbers(cache.buffer.whole), cache.capacity, cache.length
        text.num_rows, text.ids, text.features = n, addressof(ids), _numbers(features)
        text.max_depth, text.num_nodes, text.pool = tree_size.max_depth, most, pool
        text.temperature = state.sampling.temperature
        text.stream = state.sampling.stream(state.sequence_id)
        text.tree_ids, text.tree_parents = addressof(tree_ids), addressof(parents)
        text.tree_scores = addressof(scores)
        return kept, tree_ids, parents, scores

    def _rotate(self, length: int) -> None:
        """Have cos, sin [length, d] float32 of all positions."""
        tables = self.drafter.rotary(torch.empty(0), torch.arange(length)[None])
        self._rotation, self._rotated = [table[0].contiguous() for table in tables], length
        self._job.cos, self._job.sin = map(_data, self._rotation)

    def _scored(self, table: Table) -> _Matrix:
        """The rows of a head: as bytes, if they stay as they are."""
        if not table.fixed:
            return _Matrix(_numbers(table.rows))
        if self._head[0] is not table.rows:
            self._head = table.rows, self._matrix(table.rows)
        return self._head[1]

    def _matrix(self, weight: Tensor) -> _Matrix:
        weight = weight.detach()
        packed = weights_like(weight.new_empty(weight.shape, dtype=torch.int8))
        scales = weight.new_empty(len(weight), dtype=torch.float32)
        for rows, as_bytes, scale in zip(*(t.split(4096) for t in (weight, packed, scales)), strict=True):
            torch.amax(rows.abs().float(), 1, out=scale).clamp_(min=1e-30).div_(127)
            as_bytes.copy_((rows / scale[:, None]).round())
        self._owned += packed, scales
        return _Matrix(_numbers(packed), _data(scales))

    def _vector(self, values: Tensor) -> int:
        self._owned.append(values.detach().float().contiguous())
        return self._owned[-1].data_ptr()


def _numbers(tensor: Tensor) -> _Numbers:
    assert tensor.is_contiguous()
    return _Numbers(tensor.data_ptr(), tensor.dtype == torch.float32)


def _data(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
