"""The target: a frozen Hugging Face causal LM that verifies draft trees. It holds no per-sequence state.

Shapes: B sequences, N packed rows, V vocabulary, h hidden size. A feature is the vector that enters the LM
head, after the final norm: `get_decoder()(...).last_hidden_state`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coral.cache import KVCache
from coral.device import has_fast_bfloat16
from coral.errors import CoralError
from coral.gpu.graphs import steady
from coral.target.gguf import cache as gguf
from coral.target.gguf.blocks import Blocks
from coral.target.native import NativeForward, why_not_anywhere, why_not_native
from coral.target.second_start import Recorded, Start
from coral.target.source import Loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coral.target.forward import ModelForward
    from coral.tree import DraftTree

BACKENDS = ("auto", "native", "transformers", "graphs")


class Target:
    """A frozen causal LM. See `load`.

    Args:
        model: Hugging Face's, or what a first start wrote down of it.
        freeze: take the model out of training mode and its parameters out of autograd, for good.
        blocks: those of the model's GGUF file, with which decoding multiplies, always natively.

    Attributes:
        model, config, decoder: the Hugging Face objects, loaded when they are first asked for.
        tokenizer: None when none was given.
        facts: what is known of the model without them.
        name, revision: where the weights came from; recorded in drafter checkpoints.
        head_weight: [V, h]; head_bias: [V] or None; embedding_weight: [V, h].
        context_length: the longest sequence that is decoded exactly.
        eos_ids: ids that end a text.
        precision: "packed", or the name of the dtype.
        window: the sliding window of the layers that have one; None where none has.
    """

    def __init__(
        self,
        model: PreTrainedModel | Recorded,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        freeze: bool = True,
        blocks: Blocks | None = None,
    ) -> None:
        source = model if isinstance(model, Recorded) else Loaded(model, tokenizer, freeze)
        self.source, self.facts, self.tokenizer = source, source.facts, tokenizer
        self.name = name or source.model.config._name_or_path or source.facts.family
        self.revision = revision
        self.head_weight, self.head_bias = source.head_weight, source.head_bias
        self.embedding_weight = source.embedding_weight
        self.context_length, self.window = source.facts.context_length, source.facts.window
        self.eos_ids = frozenset(source.facts.eos_ids)
        self.blocks, self.precision = blocks, "packed" if blocks else str(self.dtype).removeprefix("torch.")
        self._forward: ModelForward | None = None
        self._native = None if blocks is None else NativeForward.of(self)

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
        if not isinstance(source, str | Path):
            return cls(source, tokenizer, revision=revision)
        dtype = str(dtype or "auto").removeprefix("torch.")
        attention = attention or "sdpa"
        if dtype not in ("auto", "float32", "bfloat16", "float16", "packed"):
            raise CoralError(f"dtype {dtype!r} is not known; use auto, float32, bfloat16, float16 or packed.")
        if attention not in ("sdpa", "eager"):
            raise CoralError(f"attention {attention!r} takes no arbitrary mask; use sdpa or eager.")
        loading = {"device": device, "device_map": device_map, "attention": attention, "revision": revision}
        from_files = partial(_from_files, str(source), tokenizer, dtype, trust_remote_code, loading)
        plain = tokenizer is None and device in (None, "cpu") and not trust_remote_code
        plain = plain and device_map is None and attention == "sdpa"
        start = Start.of(source, dtype, revision) if plain else None
        if start is not None and (record := start.read()) is not None:
            words = start.tokenizer(record, lambda: from_files()[1])
            model = Recorded(record, lambda: from_files()[0])
            blocks = None if record.blocks is None else Blocks(record.blocks)
            return cls(model, words, name=str(source), revision=revision, blocks=blocks)
        blocks = gguf.blocks(source, revision) if dtype == "packed" else None
        loaded, tokenizer, revision = from_files()
        target = cls(loaded, tokenizer, name=str(source), revision=revision, blocks=blocks)
        if plain and why_not_anywhere(target) is None and (start := Start.of(source, dtype, revision)):
            start.write(target)
        return target

    def for_many_rows(self) -> Target:
        """This target, its model made float32 where a CPU has no instructions for many rows of bfloat16."""
        fast = self.device.type != "cpu" or self.dtype.itemsize > 2 or has_fast_bfloat16(self.device)
        if fast or self._is_spread:
            return self
        return Target(self.model.float(), self.tokenizer, name=self.name, revision=self.revision)

    @property
    def model(self) -> PreTrainedModel:
        return self.source.model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    @property
    def forward(self) -> ModelForward:
        """Rows by transformers' code."""
        if self._forward is None:
            from coral.target.forward import ModelForward  # which imports it, for seconds

            self._forward = ModelForward(self.model, self.window)
        return self._forward

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
        return self._forward is not None and self._forward.pads

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows for which forwards of fixed shape were made; see `on`."""
        return () if self._forward is None else self._forward.sizes

    def padding(self, counts: Sequence[int]) -> int:
        """Rows that a forward over trees of so many nodes computes beside them."""
        if not self.pads or len(counts) > 1:
            return 0
        return next((size for size in self.sizes if size >= counts[0]), counts[0]) - counts[0]

    @property
    def hidden_size(self) -> int:
        return self.head_weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.head_weight.shape[0]

    def on(self, backend: str = "auto", rows: Sequence[int] = ()) -> Target:
        """This target with another way to compute its rows; the model is shared.

        Args:
            backend: "native" is C++ on a CPU, for any number of rows; "transformers" is the model's own code;
                "graphs" are forwards of fixed shape for one sequence, recorded on a GPU; "auto" is native
                where that can be, else transformers.
            rows: of graphs, the sizes; a tree is padded to the next one. Each is made when it is first met. A
                larger tree, and several sequences, run as transformers' code.

        Raises:
            CoralError: another backend, or native, but that cannot be: says why.
        """
        if backend not in BACKENDS:
            raise CoralError(f"backend {backend!r} is not known; use {', '.join(BACKENDS)}.")
        target = copy(self)
        if backend == "native" or (backend == "auto" and not self.blocks and why_not_native(self) is None):
            target._native = self._native if self.blocks else NativeForward.of(self)
        elif backend != "auto":
            if self.blocks:
                raise CoralError("packed blocks are multiplied natively alone; use another dtype.")
            target._native = None
        if backend == "graphs":
            target._forward = self.forward.fixed(rows)
        return target

    @property
    def backend(self) -> str:
        """Which of the backends computes rows."""
        return "native" if self._native else "graphs" if self.pads else "transformers"

    def sized(self, rows: int) -> Target:
        """This target, with trees padded to `rows` alone; where it does not pad them, as it is."""
        if not self.pads:
            return self
        target = copy(self)
        target._forward = self.forward.only({1, rows})
        return target

    @property
    def is_stale(self) -> bool:
        """Whether the model got another embedding or LM head since it was wrapped."""
        return self.source.is_stale

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding as stored, [...] int64 -> [..., h]; see `DrafterConfig.embedding_scale`."""
        return F.embedding(ids.to(self.embedding_weight.device), self.embedding_weight).to(self.device)

    def head(self, features: Tensor) -> Tensor:
        """[..., h] -> [..., V] logits, exactly as the model computes them."""
        return F.linear(features, self.head_weight, self.head_bias)

    @torch.no_grad()
    def states(
        self, input_ids: Tensor, document_starts: Tensor | None = None, layers: tuple[int, ...] = (-1,)
    ) -> Tensor:
        """States [B, L, len(layers) * h] of whole rows, in the model's dtype, without a cache, for training.

        Args:
            input_ids: [B, L] int64.
            document_starts: [B, L] bool, True where a packed document begins; positions restart there and
                attention does not look across. None: one document a row.
            layers: as of `verify`.
        """
        return self.forward.states(input_ids, document_starts, layers)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty KV cache with room for `capacity` rows or more (it grows when that is not enough)."""
        return KVCache(self.facts.num_layers, self.room(capacity), self._is_spread)

    @property
    def _is_spread(self) -> bool:
        """Whether accelerate has put its layers on several devices."""
        return isinstance(self.source, Loaded) and hasattr(self.model, "hf_device_map")

    def room(self, capacity: int) -> int:
        """The capacity of a cache for so many rows: one that many texts share, if forwards are recorded."""
        return steady(capacity) if self.sizes and self.device.type == "cuda" else capacity

    @torch.inference_mode()
    def read(self, cache: KVCache, tokens: Sequence[int], layers: tuple[int, ...]) -> Tensor | None:
        """Read a piece of a prompt behind what the cache holds, without logits; its states as of `verify`."""
        if self._native:
            return self._native.read(cache, tokens, layers)
        return self.forward.read(cache, tokens, layers)

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
                "rotary frequencies may change there; a proposer keeps to tree_size.within(state.remaining)."
            )
        if self._native:
            logits, states = self._native.verify(caches, trees, layers)
        else:
            logits, states = self.forward.verify(caches, trees, layers, last + 1)
        return _split(logits, counts), [None] * len(counts) if states is None else [*_split(states, counts)]


def _from_files(source: str, *asked: Any) -> Any:
    """See `loading.load`; late, for it imports transformers."""
    from coral.target.loading import load

    return load(source, *asked)


def _split(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """[N, ...] of all sequences, sequence by sequence; of one without a call of torch."""
    return [rows] if len(counts) == 1 else [*rows.split(counts)]
