"""Prompt lookup: what followed an earlier occurrence of the text's end is drafted again. A kind, see
`coral.drafters.kinds`.

Source of the method: prompt lookup decoding (Saxena 2023). Here several occurrences share one tree, and a
node's score is learnt from the text: how often, behind a match of that length, the next token was right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from coral.json_file import Size
from coral.tree import DraftTree, TreeSize

if TYPE_CHECKING:
    import torch

    from coral.decoding.state import State

_FIRST = (0.0, 0.25, 0.5, 0.8, 0.9, 0.95)
"""How likely the next token is right behind a match of 0, 1, 2-3, 4-7, 8-15 tokens and more, before a text
has shown it; between what docs/log.md has for the package's target at T = 0 and T = 1."""
_WEIGHT = 3.0  # what that counts for, in tokens of the text
_LOOKED_AT = 64  # of a token's occurrences, the last ones


@dataclass(frozen=True)
class Config:
    """max_n: longest match that is looked for."""

    max_n: Size = 16

    def check_sizes(self, target: Any) -> None:
        """It fits every target."""


class Drafter(nn.Module):
    """Without weights: it says how long a match may be."""

    kind = "lookup"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config


Options, draft = Config, None


def layers(config: Config) -> tuple[int, ...]:
    return ()


def inner(target: Any, options: Config) -> tuple[int, ...]:
    return ()


def engine_config(config: Config, dtype: torch.dtype) -> None:
    """No other engine reads it."""


def new(target: Any, options: Config, batch: Any, seed: int, counts: Any) -> Drafter:
    return Drafter(Config(options.max_n))


def learner(drafter: Drafter, config: Any) -> None:
    """There is nothing to train."""


def proposer(drafter: Drafter, target: Any, head: Any, coupled: bool) -> NGram:
    return NGram(drafter.config.max_n)


class NGram:
    """Needs no training. The longest match comes first, then the others, each the most recent of its length.

    No node is drafted that is less likely than the tree size's `min_gain`.

    max_n: longest match that is looked for.
    """

    layers = ()

    def __init__(self, max_n: int = 16) -> None:
        self.max_n = max_n

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        return [self._tree(state, tree_size.within(state.remaining)) for state in states]

    def _tree(self, state: State, tree_size: TreeSize) -> DraftTree:
        index = state.memory.get(self)
        if index is None or not index.begins(state.tokens):
            index = state.memory[self] = _Index(self.max_n)
        index.extend(state.tokens, state.prompt_length)
        tokens, parents, chances = [state.tokens[-1]], [-1], [1.0]
        left = [1.0]  # of each node, the probability that its children so far are wrong
        children: dict[tuple[int, int], int] = {}
        for length, end in index.matches(state.tokens, tree_size.top_k):
            node, behind = 0, state.tokens[end : end + tree_size.max_depth]
            for depth in range(tree_size.max_depth):
                token = behind[depth % len(behind)]  # a text that goes round in a circle goes on so
                child = children.get((node, token))
                if child is None:
                    chance = left[node] * index.chance(length + depth)
                    if len(tokens) > tree_size.num_nodes or chances[node] * chance < tree_size.min_gain:
                        break
                    child = children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    chances.append(chances[node] * chance)
                    left[node] -= chance
                    left.append(1.0)
                node = child
        return DraftTree(tokens, parents, [*map(math.log, chances)])


class _Index:
    """Where each token of a growing text stands, and how the longest match with its end has fared.

    tokens: the text, read up to `length`.
    match: how long the longest earlier occurrence of the text's end is, and the position behind it; while it
    goes on as the text does, no other can become longer.
    """

    def __init__(self, max_n: int) -> None:
        self.max_n = max_n
        self.tokens, self.length, self.match = list[int](), 0, (0, 0)
        self._places: defaultdict[int, list[int]] = defaultdict(list)
        self._tried = [_WEIGHT] * len(_FIRST)
        self._right = [_WEIGHT * chance for chance in _FIRST]

    def begins(self, tokens: list[int]) -> bool:
        """Whether what was read is how a text begins; a conversation may have been rewritten."""
        return tokens is self.tokens or tokens[: self.length] == self.tokens[: self.length]

    def extend(self, tokens: list[int], prompt_length: int) -> None:
        """Read the tokens since the last call; those behind the prompt show what a match is worth."""
        for place in range(self.length, len(tokens)):
            length, end = self.match
            right = length > 0 and tokens[end] == tokens[place]
            if length and place >= prompt_length:
                self._tried[_kind(length)] += 1
                self._right[_kind(length)] += right
            if right:
                self.match = length + 1, end + 1
            else:  # what is behind a token that a prompt goes on with is not asked
                asked = place >= prompt_length - 1
                self.match = max(self._occurrences(tokens, place), default=(0, 0)) if asked else (0, 0)
            self._places[tokens[place]].append(place)
        self.tokens, self.length = tokens, len(tokens)

    def matches(self, tokens: Sequence[int], count: int) -> list[tuple[int, int]]:
        """Lengths of earlier occurrences of the text's end and the positions behind them, best first."""
        found = [self.match]
        if count > 1:
            others = sorted(self._occurrences(tokens, len(tokens) - 1), reverse=True)
            found += [other for other in others if other[1] != self.match[1]][: count - 1]
        return [match for match in found if match[0] > 0]

    def chance(self, length: int) -> float:
        """How likely the token behind a match of this length is right."""
        return self._right[_kind(length)] / self._tried[_kind(length)]

    def _occurrences(self, tokens: Sequence[int], last: int) -> list[tuple[int, int]]:
        """Of what ends with position `last`: earlier occurrences, as lengths and the positions behind."""
        found = []
        for place in self._places[tokens[last]][-_LOOKED_AT:]:
            length, most = 1, min(self.max_n, place + 1)
            while length < most and tokens[place - length] == tokens[last - length]:
                length += 1
            if place < last:
                found.append((length, place + 1))
        return found


def _kind(length: int) -> int:
    """Matches that are judged together."""
    return min(length.bit_length(), len(_FIRST) - 1)
