"""A target's rows through transformers' own code: as it is, or in forwards of fixed shape made from it.

Shapes: B sequences, N packed rows, V vocabulary, h hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from coral.cache import KVCache, Layer, pack, pack_masks
from coral.device import upload
from coral.gpu.compiled import compiled, fix, fixed_layers
from coral.target.families import alike
from coral.target.grouped_sdpa import GROUPED_SDPA

if TYPE_CHECKING:
    from coral.tree import DraftTree


class ModelForward:
    """The slow twin of `native.NativeForward`, for any family and device.

    window: the sliding window of the layers that have one; None where none has.
    sizes: numbers of rows for which there is a forward of fixed shape.
    """

    def __init__(self, model: PreTrainedModel, window: int | None) -> None:
        self.decoder, self.config, self.window = model.get_decoder(), model.config, window
        self.head: Any = model.get_output_embeddings()
        self.sizes: tuple[int, ...] = ()
        self._decode: Any = None

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def pads(self) -> bool:
        return self._decode is not None

    def fixed(self, sizes: Iterable[int]) -> ModelForward:
        """With a forward of fixed shape for each of these numbers of rows, made when it is first needed."""
        fixed = copy(self)
        fixed.sizes = tuple(sorted({*sizes}))
        fixed._decode = compiled(self._forward_and_score, self.device, inputs=5)
        return fixed

    def only(self, sizes: Iterable[int]) -> ModelForward:
        """With those forwards of fixed shape alone that are for these numbers of rows."""
        chosen = copy(self)
        chosen.sizes = tuple(sorted({*sizes}))
        return chosen

    def states(self, input_ids: Tensor, document_starts: Tensor | None, layers: tuple[int, ...]) -> Tensor:
        """See `Target.states`."""
        rows = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        if document_starts is None and (self.window is None or len(rows[0]) <= self.window):
            return self._run(input_ids, None, None, None, layers)[1]
        starts = torch.zeros_like(rows)
        if document_starts is not None:
            starts = torch.where(document_starts, rows, 0).cummax(-1).values
        positions = rows - starts
        if self.config._attn_implementation != GROUPED_SDPA:
            allowed = (starts[:, :, None] == starts[:, None, :]) & (rows[:, :, None] >= rows[:, None, :])
            return self._forward(input_ids, positions, allowed, positions, None, layers)[1]
        near = starts if self.window is None else torch.maximum(starts, rows - self.window + 1)
        mask = self._for_layers(starts[:, None, None], near[:, None, None])
        return self._run(input_ids, positions, mask, None, layers)[1]

    def read(self, cache: KVCache, tokens: Sequence[int], layers: tuple[int, ...]) -> Tensor | None:
        """See `Target.read`."""
        key_positions = torch.arange(cache.length + len(tokens), device=self.device)
        positions = key_positions[cache.length :]
        allowed = key_positions[None, :] <= positions[:, None]
        ids = upload(tokens, self.device)[None]
        _, states = self._forward(
            ids, positions[None], allowed[None], key_positions[None], cache.layers, layers
        )
        return states[0] if layers else None

    def verify(
        self,
        caches: Sequence[KVCache],
        trees: Sequence[DraftTree],
        layers: tuple[int, ...],
        length: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [N, V] and states of all nodes, by transformers' code or a compiled forward."""
        counts, lengths = [len(tree) for tree in trees], [cache.length for cache in caches]
        ids = torch.cat([tree.tokens for tree in trees])[None]
        new = [length + tree.depth for length, tree in zip(lengths, trees, strict=True)]
        positions = torch.cat(new)[None]
        mask, key_positions = pack_masks(lengths, [tree.mask for tree in trees], new)
        size = self._size(caches, counts) if {*layers} <= {-1} else None
        if size is None:
            # In plain decoding one row sees everything, and a kernel without a mask is faster.
            allowed, cache = (None if counts == [1] else mask), pack(caches, counts)
            features, states = self._forward(ids, positions, allowed, key_positions, cache, layers, length)
            return self.head(features[0]), states[0] if layers else None
        allowed, slots, storage = fix(caches[0], size, mask)
        ids, positions = (F.pad(rows, (0, size - counts[0])) for rows in (ids, positions))
        key_positions = F.pad(key_positions, (0, allowed.shape[2] - key_positions.shape[1]))
        torch._dynamo.mark_dynamic(key_positions, 1)
        features, logits = self._decode(ids, positions, allowed, key_positions, slots, *storage)
        return logits[: counts[0]], features[: counts[0]]

    def _size(self, caches: Sequence[KVCache], counts: list[int]) -> int | None:
        """To how many rows this forward is padded and compiled; None: neither."""
        if not self.pads or len(counts) > 1 or caches[0].length == 0:
            return None
        return next((size for size in self.sizes if size >= counts[0]), None)

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        allowed: Tensor | None,
        key_positions: Tensor | None,
        cache: Sequence[Layer] | None,
        layers: tuple[int, ...] = (),
        length: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Features [B, N, h], and the states of `layers`; `allowed` [B, N, keys] bool says who attends to
        whom, before any window. None: the one row to all `length` rows.
        """
        window = self.window
        if allowed is None and window is not None and length > window:
            key_positions = torch.arange(length, device=ids.device)[None]
            allowed = torch.ones(1, 1, length, dtype=torch.bool, device=ids.device)
        mask: Any = None
        if allowed is not None:
            assert key_positions is not None
            mask = full = self._mask(allowed)
            if window is not None:
                near = positions[:, :, None] - key_positions[:, None, :] < window
                mask = self._for_layers(full, self._mask(allowed & near))
        return self._run(ids, positions, mask, cache, layers)

    def _for_layers(self, full: Tensor, windowed: Tensor) -> Any:
        """Masks of layers without and with a window as the model's family takes them."""
        if self.window is None:
            return full
        kinds = {"full_attention": full, "sliding_attention": windowed}
        return windowed if alike(self.config) else kinds

    def _run(
        self,
        ids: Tensor,
        positions: Tensor | None,
        mask: Any,
        cache: Sequence[Layer] | None,
        layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """Features [B, N, h] and the states of `layers`, [B, N, len(layers) * h]; no others are kept."""
        inner = {*layers} - {-1}
        nothing: dict[int, Tensor] = {}  # torch compiles this, but not a call of dict[int, Tensor]
        with _entering(self.decoder.layers, inner) if inner else nullcontext(nothing) as states:
            output = self.decoder(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=None if cache is None else their_cache(cache),
                use_cache=cache is not None,
            )
        states[-1] = features = output.last_hidden_state.to(self.device)
        wanted = [states[layer].to(self.device) for layer in layers] or [features[..., :0]]
        return features, torch.cat(wanted, -1) if len(wanted) > 1 else wanted[0]

    def _forward_and_score(
        self,
        ids: Tensor,
        positions: Tensor,
        allowed: Tensor,
        key_positions: Tensor,
        slots: Tensor,
        *storage: Tensor,
    ) -> tuple[Tensor, Tensor]:
        features = self._forward(ids, positions, allowed, key_positions, fixed_layers(slots, storage))[0][0]
        return features, self.head(features)

    def _mask(self, allowed: Tensor) -> Tensor:
        """[B, N, keys] bool -> [B, 1, N, keys]: boolean for sdpa, additive for eager."""
        if self.config._attn_implementation != "eager":
            return allowed[:, None]
        zero = torch.zeros((), dtype=self.head.weight.dtype, device=allowed.device)
        return torch.where(allowed, zero, torch.finfo(self.head.weight.dtype).min)[:, None]


@contextmanager
def _entering(decoder_layers: Any, layers: set[int]) -> Iterator[dict[int, Tensor]]:
    """Collects what enters these layers while the decoder runs."""
    taken: dict[int, Tensor] = {}

    def take(layer: int) -> Any:
        def before(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            taken[layer] = args[0] if args else kwargs["hidden_states"]

        return decoder_layers[layer].register_forward_pre_hook(before, with_kwargs=True)

    hooks = [*map(take, layers)]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def their_cache(layers: Sequence[Layer]) -> Cache:
    """Layers of ours as transformers' code wants them."""
    return Cache(layers=[*map(_TheirLayer, layers)])


class _TheirLayer(DynamicLayer):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._layer.update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self._layer.length
