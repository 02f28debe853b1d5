"""A head of the ids that the text at hand uses: no training, and a few thousand rows for any vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from coral.device import upload
from coral.drafters.heads.rows import Table
from coral.drafters.heads.stored import Stored
from coral.drafters.heads.vocabulary import special_ids
from coral.target.target import Target

WINDOW = 3072
_CANDIDATES = 3  # of the target's likeliest ids at each node, which enter


class InContextHead:
    """The LM head's rows of a window of ids for each sequence (NanoSpec, arXiv 2605.26444).

    Ids arrive from the prompt and the text so far, from drafted trees, and from the target's likeliest
    candidates at the nodes that it verified last. The window holds the ids that arrived last, each once:
    first in, first out, where an id that comes again counts as new. Special ids stay. Until a text has filled
    it, the rest are the lowest ids, which byte-pair vocabularies give to their most frequent pieces.

    The score of an id is its log-softmax among the ids of its sequence's window.

    Args:
        window: ids that may be drafted, V at most.
    """

    def __init__(self, target: Target, window: int = WINDOW) -> None:
        weight = target.head_weight
        self.target, self.size = target, min(window, len(weight))
        self.num_bytes = self.size * weight.shape[1] * weight.element_size()

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for state, rows in zip(states, features.chunk(len(states)), strict=True):
            window = self.window(state)
            logits = window.logits(rows)
            values, best = logits.topk(min(k, self.size), dim=-1)
            found.append((window.ids[best], values - logits.logsumexp(-1, keepdim=True)))
        ids, log_probs = (torch.cat(parts) for parts in zip(*found, strict=True))
        return ids, log_probs

    def table(self, state: Any) -> Table:
        return self.window(state).table

    def window(self, state: Any) -> _Window:
        """The window of a sequence, with all in it that arrived up to now."""
        window: _Window | None = state.memory.get(self)
        if window is None:
            window = state.memory[self] = _Window(self.target, self.size)
        window.read(state)
        return window


def build(target: Target, stored: Stored) -> InContextHead:
    """Made from the target alone."""
    return InContextHead(target)


class _Window:
    """Distinct ids and their rows of the LM head, in buffers that never move.

    What changes them are operations of fixed shapes that never wait for the device.

    ids: int64 [size + 1], rows: [size + 1, h], bias: [size + 1] or None; the last place takes what is not
    new.
    arrived: int64 [V + 1], when each id arrived last; not positive: never.
    held: bool [V + 1], which are in the window.
    """

    @torch.inference_mode()
    def __init__(self, target: Target, size: int) -> None:
        self.weight, self.all_bias = target.head_weight, target.head_bias
        self.size, vocab_size, device = size, len(self.weight), self.weight.device
        special = special_ids(target)
        self.arrived = -torch.arange(vocab_size + 1, device=device)
        self.arrived[upload(special, device)] = torch.iinfo(torch.int64).max
        first = self.arrived[:vocab_size].argsort(descending=True)[:size]
        self.ids = torch.cat([first, first.new_full((1,), vocab_size)])
        self.held = torch.zeros(vocab_size + 1, dtype=torch.bool, device=device)
        self.held[first] = True
        there = self.ids.clamp(max=vocab_size - 1)
        self.rows = self.weight[there]
        self.bias = None if self.all_bias is None else self.all_bias[there]
        self.room, self.clock = max(1, size - len(special)), 1
        self.tokens, self.length = list[int](), 0  # the text that was read, and how far

    @property
    def table(self) -> Table:
        bias = None if self.bias is None else self.bias[: self.size].float()
        return Table(self.rows[: self.size], bias, self.ids[: self.size])

    def logits(self, features: Tensor) -> Tensor:
        """[n, h] -> [n, size] float32, in the order of `ids`."""
        bias = None if self.bias is None else self.bias[: self.size]
        return linear(features, self.rows[: self.size], bias).float()

    @torch.inference_mode()
    def read(self, state: Any) -> None:
        """Let in what arrived since the last cycle; a text that was replaced is read from its start."""
        if state.tokens is self.tokens and len(state.tokens) == self.length:
            return
        new = state.tokens[self.length if state.tokens is self.tokens else 0 :]
        self.tokens, self.length = state.tokens, len(state.tokens)
        device = self.ids.device
        arrivals = []
        if state.tree is not None:
            arrivals.append(state.tree.tokens[1:])
            arrivals.append(likeliest(state.logits, _CANDIDATES).flatten())
        text = upload([*dict.fromkeys(reversed(new))][::-1], device)
        self.add(torch.cat([*arrivals, text]))

    @torch.inference_mode()
    def add(self, ids: Tensor) -> None:
        """Let ids [n] in, the last ones as the newest."""
        spare, no_id = self.size, len(self.weight)
        for part in ids.split(self.room):
            now = torch.arange(self.clock, self.clock + len(part), device=ids.device)
            self.clock += len(part)
            self.arrived.scatter_reduce_(0, part, now, "amax")
            fresh = (self.arrived[part] == now) & ~self.held[part]  # each new id once
            oldest = self.arrived[self.ids[:spare]].topk(len(part), largest=False).indices
            place = torch.where(fresh, oldest[fresh.cumsum(0) - 1], spare)
            entering = torch.where(fresh, part, no_id)
            self.held[self.ids[place]] = False
            self.held[entering] = True
            self.ids[place] = entering
            self.rows[place] = self.weight[part]
            if self.bias is not None and self.all_bias is not None:
                self.bias[place] = self.all_bias[part]


def likeliest(logits: Tensor, k: int) -> Tensor:
    """The ids [N, k] of the k highest of each row of logits [N, V].

    They lie in the k of some columns whose maxima are the highest: a maximum over columns is vectorised, a
    selection from a wide row is not. 16 rows of 128,256 on one core: 3.2 ms instead of 11.3.
    """
    columns = math.gcd(logits.shape[-1], 256)
    if columns < 32:
        return logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    table = logits.unflatten(-1, (-1, columns))  # [N, V / columns, columns]
    best = table.amax(1).topk(k, dim=-1).indices  # [N, k]
    kept = table.gather(2, best.unsqueeze(1).expand(-1, table.shape[1], -1)).flatten(1)
    found = kept.topk(k, dim=-1).indices
    return found // k * columns + best.gather(1, found % k)
