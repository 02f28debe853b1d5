"""Prompt lookup as a tree: what followed earlier occurrences of the last n-gram is drafted again.

Source of the method: prompt lookup decoding (Saxena 2023); here several occurrences share one tree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from coral.decoding.state import Committed, State
from coral.decoding.tree import Budget, DraftTree


class NGram:
    """Needs no training. The longest matching n-gram's most recent occurrences come first.

    max_n: longest n-gram looked up; shorter ones follow down to min_n.
    """

    def __init__(self, max_n: int = 4, min_n: int = 2) -> None:
        self.max_n, self.min_n = max_n, min_n

    def propose(
        self, states: Sequence[State], committed: Sequence[Committed], budget: Budget
    ) -> list[DraftTree]:
        return [
            self._tree(state, rows.start, budget.within(state.remaining))
            for state, rows in zip(states, committed, strict=True)
        ]

    def _tree(self, state: State, known: int, budget: Budget) -> DraftTree:
        """`known`: how many tokens are surely as in the last call; a conversation may have been rewritten."""
        if not isinstance(state.memory, _Index) or len(state.memory) > known + 1:
            state.memory = _Index(self.min_n, self.max_n)
        state.memory.extend(state.tokens)
        tokens, parents, depth = [state.tokens[-1]], [-1], [0]
        children: dict[tuple[int, int], int] = {}
        for end in state.memory.continuations(state.tokens, budget.top_k):
            node = 0
            for token in state.tokens[end : end + budget.max_depth]:
                child = children.get((node, token))
                if child is None:
                    if len(tokens) > budget.num_nodes:
                        break
                    child = children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    depth.append(depth[node] + 1)
                node = child
        return DraftTree(torch.tensor(tokens), torch.tensor(parents), -torch.tensor(depth).float())


class _Index:
    """Where each n-gram of a growing text ends."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self.sizes, self.length = range(max_n, min_n - 1, -1), 0
        self.ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return self.length

    def extend(self, tokens: list[int]) -> None:
        """Index the n-grams that ended since the last call; the last one has no continuation yet."""
        for end in range(max(self.length, 1), len(tokens)):
            for n in self.sizes:
                if end >= n:
                    self.ends[tuple(tokens[end - n : end])].append(end)
        self.length = len(tokens)

    def continuations(self, tokens: list[int], count: int) -> list[int]:
        """Positions that follow earlier occurrences of the last n-gram: longest first, then most recent."""
        found: dict[int, None] = {}
        for n in self.sizes:
            for end in reversed(self.ends.get(tuple(tokens[-n:]), [])[-count:]):
                found.setdefault(end)
        return list(found)[:count]
