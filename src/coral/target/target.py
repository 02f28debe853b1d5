"""The target: a frozen Hugging Face causal LM that verifies draft trees. It holds no per-sequence state.

Shapes: B sequences, N packed rows, V vocabulary, h hidden size. A feature is the vector that enters the LM
head, after the final norm: `get_decoder()(...).last_hidden_state`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coral.cache import KVCache, pack, pack_masks
from coral.device import upload
from coral.errors import CoralError
from coral.gpu.compiled import compiled, fix, fixed_cache
from coral.gpu.graphs import steady
from coral.native.packed import pack_linears
from coral.target.attention import GROUPED_SDPA
from coral.target.families import alike, check_supported, context_length, eos_ids, sliding_window
from coral.target.gguf import cache as gguf
from coral.target.ids import outer_weights
from coral.target.loading import load_config, load_model, load_tokenizer
from coral.target.native import NativeForward

if TYPE_CHECKING:
    from coral.target.gguf.blocks import Blocks
    from coral.tree import DraftTree

_ATTENTION = ("sdpa", "eager")  # kernels that take an arbitrary mask; "sdpa" is loaded as our grouped form


class Target:
    """A frozen causal LM. See `load`.

    Args:
        freeze: take the model out of training mode and its parameters out of autograd, for good.
        blocks: those of the model's GGUF file, with which decoding multiplies, always natively.

    Attributes:
        model, tokenizer, config: the Hugging Face objects (tokenizer may be None when none was given).
        name, revision: where the weights came from; recorded in drafter checkpoints.
        head_weight: [V, h]; head_bias: [V] or None; embedding_weight: [V, h].
        context_length: the longest sequence that is decoded exactly.
        eos_ids: ids that end a text.
        precision: "packed", or the name of the dtype.
        window: the sliding window of the layers that have one; None where none has.
        sizes: numbers of rows for which verification is compiled; see `compiled`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        freeze: bool = True,
        blocks: Blocks | None = None,
    ) -> None:
        check_supported(model.config)
        if model.config._attn_implementation not in (*_ATTENTION, GROUPED_SDPA):
            raise CoralError(
                f"attention {model.config._attn_implementation!r} takes no arbitrary mask, which trees need; "
                f"load the model with attn_implementation='sdpa' or 'eager'."
            )
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if any(parameter.is_meta for end in ends for parameter in end.parameters()):
            raise CoralError(
                "the model's embedding or LM head is offloaded to the CPU or disk; only layers may be: use a "
                "device map that keeps these two on a device."
            )
        self.model = model.eval().requires_grad_(False) if freeze else model
        self.tokenizer, self.config = tokenizer, model.config
        self.name = name or model.config._name_or_path or model.config.model_type
        self.revision = revision
        self.decoder = model.get_decoder()
        head = model.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        self._head = head
        self.head_weight: Tensor = head.weight
        self.head_bias: Tensor | None = getattr(head, "bias", None)
        embedding: Any = model.get_input_embeddings()
        self.embedding_weight: Tensor = embedding.weight
        self._outer = outer_weights(model)
        self.context_length = context_length(model.config)
        self.eos_ids = eos_ids(model, tokenizer)
        self.window = sliding_window(model.config)
        self.sizes: tuple[int, ...] = ()
        self._decode: Any = None
        self.blocks, self.precision = blocks, "packed" if blocks else str(self.dtype).removeprefix("torch.")
        self._native = None if blocks is None else NativeForward.packed(self)

    @classmethod
    def load(
        cls,
        source: str | Path | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype | None = "auto",
        device: str | None = None,
        device_map: str | dict[str, Any] | None = None,
        attention: str | None = "sdpa",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Target:
        """Load a target from a directory, a hub id, a GGUF file (see `gguf.names`), or take a loaded model.

        Args:
            dtype: "auto" (as stored; of GGUF bfloat16), "float32", "bfloat16", "float16", "packed" (blocks).
            device_map: placement of the parts by accelerate, for a model that does not fit on one device:
                "auto" or another strategy, or a device for each part. Layers may be offloaded.
            attention: "sdpa" or "eager".

        Raises:
            CoralError: not found, not supported (said before weights are read), or weights that do not fit.
        """
        if isinstance(source, PreTrainedModel):
            return cls(source, tokenizer, revision=revision)
        dtype = str(dtype or "auto").removeprefix("torch.")
        attention = attention or "sdpa"
        if dtype not in ("auto", "float32", "bfloat16", "float16", "packed"):
            raise CoralError(f"dtype {dtype!r} is not known; use auto, float32, bfloat16, float16 or packed.")
        if attention not in _ATTENTION:
            raise CoralError(f"attention {attention!r} takes no arbitrary mask; use sdpa or eager.")
        place = name = str(source)
        blocks = gguf.blocks(source, revision) if dtype == "packed" else None
        if (converted := gguf.directory(source, dtype, revision, Console(stderr=True))) is not None:
            place, dtype, revision = str(converted), "auto", None
            tokenizer = tokenizer or gguf.load_tokenizer(converted, name)
        common = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = load_config(place, name, **common)
        tokenizer = tokenizer or load_tokenizer(place, name, **common)
        model = load_model(
            place,
            name,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=GROUPED_SDPA if attention == "sdpa" else attention,
            device_map=device_map,
            device=device,
            **common,
        )
        pack_linears(model)
        revision = revision or getattr(config, "_commit_hash", None)
        return cls(model, tokenizer, name=name, revision=revision, blocks=blocks)

    @property
    def device(self) -> torch.device:
        """Where ids go in and features come out: the LM head's device, if several hold the model."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def pads(self) -> bool:
        """Whether trees are padded to one of `sizes`, so that each costs what that size does."""
        return self._decode is not None

    @property
    def hidden_size(self) -> int:
        return self.head_weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.head_weight.shape[0]

    def compiled(self, rows: Sequence[int]) -> Target:
        """This target with a faster forward for trees; the model is shared.

        On a CPU that is native code (`coral.target.native`) if it knows the model's kind.
        Else it is compiled by torch, for one sequence: a tree is padded to the next size in `rows`; a larger
        one, or several sequences, run as before. Each size is compiled when it is first met, which takes a
        few seconds a layer on a CPU.
        """
        target = copy(self)
        target.sizes = tuple(sorted(set(rows)))
        target._native = self._native if self.blocks else NativeForward.of(self)
        if target._native is None:
            target._decode = compiled(self._forward_and_score, self.device, inputs=5)
        return target

    def _size(self, caches: Sequence[KVCache], counts: list[int]) -> int | None:
        """To how many rows this forward is padded and compiled; None: neither."""
        if not self.pads or len(counts) > 1 or caches[0].length == 0:
            return None
        return next((size for size in self.sizes if size >= counts[0]), None)

    @property
    def is_stale(self) -> bool:
        """Whether the model got another embedding or LM head since it was wrapped."""
        return outer_weights(self.model) != self._outer

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding as stored, [...] int64 -> [..., h]; see `DrafterConfig.embedding_scale`."""
        return F.embedding(ids.to(self.embedding_weight.device), self.embedding_weight).to(self.device)

    def head(self, features: Tensor) -> Tensor:
        """[..., h] -> [..., V] logits, exactly as the model computes them."""
        return self._head(features)

    @torch.no_grad()
    def features(self, input_ids: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """Features [B, L, h] of whole rows, in the model's dtype, without a cache, for training.

        Args:
            input_ids: [B, L] int64.
            document_starts: [B, L] bool, True where a packed document begins; positions restart there and
                attention does not look across. None: one document a row.
        """
        rows = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        if document_starts is None and (self.window is None or len(rows[0]) <= self.window):
            return self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state.to(self.device)
        starts = torch.zeros_like(rows)
        if document_starts is not None:
            starts = torch.where(document_starts, rows, 0).cummax(-1).values
        positions = rows - starts
        if self.config._attn_implementation != GROUPED_SDPA:
            allowed = (starts[:, :, None] == starts[:, None, :]) & (rows[:, :, None] >= rows[:, None, :])
            return self._forward(input_ids, positions, allowed, positions, cache=None)[0]
        near = starts if self.window is None else torch.maximum(starts, rows - self.window + 1)
        mask = self._for_layers(starts[:, None, None], near[:, None, None])
        return self._run(input_ids, positions, mask, cache=None)[0]

    def new_cache(self, capacity: int) -> KVCache:
        """An empty KV cache with room for `capacity` rows or more (it grows when that is not enough)."""
        apart = hasattr(self.model, "hf_device_map")  # accelerate's, of several devices
        return KVCache(self.config.num_hidden_layers, self.room(capacity), apart)

    def room(self, capacity: int) -> int:
        """The capacity of a cache for so many rows: one that many texts share, if forwards are recorded."""
        return steady(capacity) if self.sizes and self.device.type == "cuda" else capacity

    @torch.inference_mode()
    def read(self, cache: KVCache, tokens: Sequence[int], layers: tuple[int, ...]) -> Tensor | None:
        """Read a piece of a prompt behind what the cache holds, without logits; its states as of `verify`."""
        if self._native and _is_simple(layers):
            features = self._native.read(cache, tokens)
            return features if layers else None
        key_positions = torch.arange(cache.length + len(tokens), device=self.device)
        positions = key_positions[cache.length :]
        allowed = key_positions[None, :] <= positions[:, None]
        ids = upload(tokens, self.device)[None]
        _, states = self._forward(ids, positions[None], allowed[None], key_positions[None], cache, layers)
        return None if states is None else states[0]

    @torch.inference_mode()
    def verify(
        self, caches: Sequence[KVCache], trees: Sequence[DraftTree], layers: tuple[int, ...] = (-1,)
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """One forward over all nodes of all trees; their keys and values are appended to the caches.

        Args:
            layers: whose states are wanted, side by side: -1 is what enters the LM head, i >= 0 what enters
                layer i.

        Returns:
            For each sequence the logits [N, V] and the states [N, len(layers) * h] of its nodes; None: no
            layers.

        Raises:
            CoralError: a tree reaches past the context.
        """
        counts, lengths = [len(tree) for tree in trees], [cache.length for cache in caches]
        trees = [tree.to(self.device) for tree in trees]
        last = max(length + tree.max_depth for length, tree in zip(lengths, trees, strict=True))
        if last >= self.context_length:
            raise CoralError(
                f"a draft tree reaches position {last}, but the target's context is {self.context_length}; "
                "rotary frequencies may change there; a proposer must keep to budget.within(state.remaining)."
            )
        native = self._native if _is_simple(layers) else None
        verified = native.verify(caches, trees) if native else self._verify(caches, trees, layers, last + 1)
        logits, states = _split(verified[0], counts), verified[1]
        return logits, [None] * len(counts) if states is None or not layers else [*_split(states, counts)]

    def _verify(
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
        size = self._size(caches, counts) if _is_simple(layers) else None
        if size is None:
            # In plain decoding one row sees everything, and a kernel without a mask is faster.
            allowed, cache = (None if counts == [1] else mask), pack(list(caches), counts)
            features, states = self._forward(ids, positions, allowed, key_positions, cache, layers, length)
            return self.head(features[0]), None if states is None else states[0]
        allowed, slots, storage = fix(caches[0], size, mask)
        ids, positions = (F.pad(rows, (0, size - counts[0])) for rows in (ids, positions))
        key_positions = F.pad(key_positions, (0, allowed.shape[2] - key_positions.shape[1]))
        torch._dynamo.mark_dynamic(key_positions, 1)
        features, logits = self._decode(ids, positions, allowed, key_positions, slots, *storage)
        return logits[: counts[0]], features[: counts[0]]

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        allowed: Tensor | None,
        key_positions: Tensor | None,
        cache: Any,
        layers: tuple[int, ...] = (),
        length: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
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
        self, ids: Tensor, positions: Tensor, mask: Any, cache: Any, layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        output = self.decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **({} if _is_simple(layers) else {"output_hidden_states": True}),
        )
        features = output.last_hidden_state.to(self.device)
        states = [
            features if layer == -1 else output.hidden_states[layer].to(self.device) for layer in layers
        ]
        return features, torch.cat(states, -1) if len(states) > 1 else next(iter(states), None)

    def _forward_and_score(
        self,
        ids: Tensor,
        positions: Tensor,
        allowed: Tensor,
        key_positions: Tensor,
        slots: Tensor,
        *storage: Tensor,
    ) -> tuple[Tensor, Tensor]:
        features = self._forward(ids, positions, allowed, key_positions, fixed_cache(slots, storage))[0][0]
        return features, self.head(features)

    def _mask(self, allowed: Tensor) -> Tensor:
        """[B, N, keys] bool -> [B, 1, N, keys]: boolean for sdpa, additive for eager."""
        if self.config._attn_implementation != "eager":
            return allowed[:, None]
        zero = torch.zeros((), dtype=self.dtype, device=allowed.device)
        return torch.where(allowed, zero, torch.finfo(self.dtype).min)[:, None]


def _is_simple(layers: tuple[int, ...]) -> bool:
    """Whether no state from within the model is wanted, which only transformers' code gives."""
    return set(layers) <= {-1}


def _split(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """[N, ...] of all sequences, sequence by sequence; of one without a call of torch."""
    return [rows] if len(counts) == 1 else [*rows.split(counts)]
