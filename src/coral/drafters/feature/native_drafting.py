"""A whole draft tree in one call on the CPU: `native/draft.cpp`, the fast twin of `propose.py`'s levels.

A draft step of a small tree is some fifteen small products, and calling them one by one costs more than they
do. Here one team of threads grows all levels of a tree in one call. Weights are bytes with a scale of each
output, rows integers of 16 bits: a quarter of float32's bytes, for a rounding that drafts hardly show.
"""

from __future__ import annotations

from ctypes import CDLL, Structure, addressof, byref, c_bool, c_float, c_int64, c_uint64, c_void_p

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


class _Job(Structure):
    """As in draft.cpp, field by field."""

    _fields_ = (
        *((name, c_int64) for name in ("threads", "hidden", "heads", "kv_heads", "head_size", "inner")),
        *((name, c_int64) for name in ("capacity", "candidates", "num_layers", "num_embedded")),
        ("layers", c_void_p),
        ("embedding", _Numbers),
        ("embedding_fc", _Matrix),
        ("feature_fc", _Matrix),
        ("head", _Matrix),
        *((name, c_void_p) for name in ("fc_bias", "head_bias", "head_ids", "cos", "sin")),
        ("eps", c_float),
        ("embedding_scale", c_float),
        ("feed_back_normalised", c_bool),
        ("cache", _Numbers),
        ("num_rows", c_int64),
        ("length", c_int64),
        ("ids", c_void_p),
        ("features", _Numbers),
        *((name, c_int64) for name in ("top_k", "max_depth", "num_nodes", "pool")),
        ("min_gain", c_float),
        ("temperature", c_float),
        ("stream", c_uint64),
        *((name, c_void_p) for name in ("tree_ids", "tree_parents", "tree_scores")),
        ("size", c_int64),
        ("depth", c_int64),
    )


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

    def grow(self, state: State, cache: KVCache, table: Table, tree_size: TreeSize, pool: int) -> DraftTree:
        """The tree of one sequence, of which one row at least is unread.

        Args:
            cache: the drafter's, of the rows in front of the unread ones; it then has these, too.
            tree_size: with at least one level.
            pool: ids of a node that compete after the sampler's noise is added; 0: it is not.
        """
        length, tokens, features = cache.length, state.unread_tokens, state.unread.features.contiguous()
        n = len(tokens)
        cache.reserve(n + tree_size.top_k * tree_size.max_depth, self._no_rows)
        if self._rotated < cache.capacity:
            self._rotate(cache.capacity)
        ids = (c_int64 * n)(*tokens)
        most = min(tree_size.num_nodes, tree_size.top_k * (1 + (tree_size.max_depth - 1) * tree_size.top_k))
        tree_ids, parents = (c_int64 * (most + 1))(), (c_int64 * (most + 1))()
        scores = (c_float * (most + 1))()
        job = _Job.from_buffer_copy(self._job)
        assert cache.buffer.whole is not None
        job.threads, job.cache = torch.get_num_threads(), _numbers(cache.buffer.whole)
        job.capacity, job.candidates = cache.capacity, len(table.rows)
        job.head, job.head_bias, job.head_ids = self._scored(table), _data(table.bias), _data(table.ids)
        job.num_rows, job.length, job.ids, job.features = n, length, addressof(ids), _numbers(features)
        job.top_k, job.max_depth, job.num_nodes = tree_size.top_k, tree_size.max_depth, most
        job.min_gain, job.pool = tree_size.min_gain, pool
        job.temperature = state.sampling.temperature
        job.stream = state.sampling.stream(state.sequence_id)
        job.tree_ids, job.tree_parents = addressof(tree_ids), addressof(parents)
        job.tree_scores = addressof(scores)
        self._run(byref(job))
        cache.set_length(length + n)
        size = job.size
        return DraftTree(tree_ids[:size], parents[:size], scores[:size], job.depth)

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
