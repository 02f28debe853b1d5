"""A parent array is the whole draft tree: mask, depth and walk follow from it. N = nodes, root included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from coral.device import CPU, has_queue, upload
from coral.errors import CoralError

_BOUNDS = {"top_k": (1, 256), "max_depth": (0, 256), "num_nodes": (1, 4096)}


@dataclass(frozen=True)
class TreeSize:
    """How large a draft tree may grow.

    top_k: children drafted per node and nodes expanded per level.
    max_depth: levels below the root; 0 turns drafting off.
    num_nodes: draft tokens sent to the target; the root is not counted.
    min_gain: tokens that a node must promise, by the drafter's own scores: none is sent to the target, or has
    children drafted, that is less likely.

    Raises:
        CoralError: a number is no whole number, or out of bounds: memory and time of a cycle grow with them.
    """

    top_k: int
    max_depth: int
    num_nodes: int
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            number = getattr(self, name)
            if type(number) is not int or not least <= number <= most:
                raise CoralError(
                    f"the draft tree's {name} is {number!r}, but it must be a whole number from {least} to "
                    f"{most}."
                )
        if type(self.min_gain) not in (int, float) or not 0 <= self.min_gain <= 1:
            raise CoralError(f"the draft tree's min_gain is {self.min_gain!r}, but it must be from 0 to 1.")

    def __str__(self) -> str:
        """As `--tree` reads it."""
        return f"{self.top_k},{self.max_depth},{self.num_nodes},{self.min_gain:g}"

    def within(self, remaining: int) -> TreeSize:
        """The same tree size when only `remaining` tokens may still be written, the bonus token included. No
        path is longer than the nodes that are kept.
        """
        return replace(self, max_depth=max(0, min(self.max_depth, self.num_nodes, remaining - 1)))


DEFAULT = TreeSize(top_k=8, max_depth=6, num_nodes=15, min_gain=0.2)
"""The tree of the commands, if none is asked for; docs/log.md has the sizes that were compared."""
CPU_DEFAULT = TreeSize(top_k=2, max_depth=6, num_nodes=7, min_gain=0.1)
"""The same on a CPU, where eight rows cost some 40% more than one, and sixteen more than twice as much."""
LOOKUP_NODES = 10
"""At least so many beside lookup: where a text repeats itself, the next ten tokens are likely right."""

_NEVER = 1e-300  # the probability of what floating point takes for impossible


class DraftTree:
    """Nodes in an order in which every parent stands before its children.

    It is made of tensors or of lists, in Python, where small trees are sooner read and made; each is there as
    the other, too, once it was asked for.

    Args:
        tokens: [N] int64; tokens[0], the root, is the last token of the sequence.
        parents: [N] int64; parents[0] = -1 and parents[i] < i.
        scores: [N] float32; cumulative log-probability of the path, 0 at the root.
        num_forwards: drafter forwards that the proposer spent on this tree.
        levels: the depth is at most this, for a tree on a GPU, where to look at it is to wait; None: look.

    Tensors are on one device: the CPU, or the GPU on which the tree grew.
    """

    def __init__(
        self,
        tokens: Tensor | list[int],
        parents: Tensor | list[int],
        scores: Tensor | list[float],
        num_forwards: int = 0,
        levels: int | None = None,
    ) -> None:
        self._parts = tokens, parents, scores
        self.num_forwards, self.levels = num_forwards, levels

    def __len__(self) -> int:
        return len(self._parts[0])

    @classmethod
    def root(cls, token: int) -> DraftTree:
        """The tree of plain decoding: one node."""
        return cls([token], [-1], [0.0], levels=0)

    @classmethod
    def chain(cls, tokens: list[int]) -> DraftTree:
        """A tree without branches: each token is the only child of the one before it."""
        return cls(tokens, [*range(-1, len(tokens) - 1)], [0.0] * len(tokens), levels=len(tokens) - 1)

    @property
    def device(self) -> torch.device:
        tokens = self._parts[0]
        return tokens.device if isinstance(tokens, Tensor) else CPU

    @cached_property
    def tokens(self) -> Tensor:
        return torch.as_tensor(self._parts[0])

    @cached_property
    def parents(self) -> Tensor:
        return torch.as_tensor(self._parts[1])

    @cached_property
    def scores(self) -> Tensor:
        return torch.as_tensor(self._parts[2], dtype=torch.float32)

    @cached_property
    def lists(self) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and scores; of a tree on a GPU, to ask is to wait."""
        tokens, parents, scores = self._parts
        return _listed(tokens), _listed(parents), _listed(scores)

    @cached_property
    def mask(self) -> Tensor:
        """[N, N] bool: row i may attend to column j when j is i or an ancestor of i."""
        n = len(self)
        nodes = torch.arange(n, device=self.device)
        reach = ((nodes == self.parents[:, None]) | (nodes == nodes[:, None])).float()
        steps, farthest = 1, n - 1 if self.levels is None else self.levels
        while steps < farthest:  # each squaring doubles the reach of the ancestor closure
            closer = (reach @ reach).clamp_(max=1.0)
            if self.levels is None and torch.equal(closer, reach):
                break
            reach, steps = closer, 2 * steps
        return reach.bool()

    @cached_property
    def depth(self) -> Tensor:
        """[N] int64 distance from the root."""
        return self.mask.sum(-1) - 1 if has_queue(self.device) else torch.tensor(self._depths)

    @cached_property
    def _depths(self) -> list[int]:
        """`depth`, of few nodes sooner counted than multiplied."""
        depths: list[int] = []
        for parent in self.lists[1]:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    @property
    def max_depth(self) -> int:
        """Levels below the root, or more where that is not known without waiting."""
        return max(self._depths) if self.levels is None else self.levels

    def to(self, device: torch.device) -> DraftTree:
        """The same tree on a device; only the way to the CPU waits."""
        if self.device == device:
            return self
        tokens, parents, scores = (upload(part, device) for part in (self.tokens, self.parents, self.scores))
        levels = self.max_depth if has_queue(device) else None
        return DraftTree(tokens, parents, scores, self.num_forwards, levels)

    def walk(self, samples: list[int]) -> list[int]:
        """Follow the target's samples from the root.

        Args:
            samples: the token the target writes after each node, [N].

        Returns:
            The path: node indices, root first. Its samples are what is emitted, the last of them, which is no
            child, as the bonus token; since it is only target samples, any tree is lossless.
        """
        tokens, parents, _ = self.lists
        children = {(parents[i], tokens[i]): i for i in range(len(tokens) - 1, 0, -1)}
        path = [0]
        while (child := children.get((path[-1], samples[path[-1]]))) is not None:
            path.append(child)
        return path


def read(trees: Sequence[DraftTree], samples: Sequence[Tensor]) -> tuple[list[DraftTree], list[list[int]]]:
    """The trees on the CPU, and the target's samples [N] of each; all in one copy, the wait of a cycle."""
    if not has_queue(samples[0].device):
        return list(trees), [sample.tolist() for sample in samples]
    parts = [
        torch.stack([tree.tokens, tree.parents, tree.scores.view(torch.int32).long(), sample])
        for tree, sample in zip(trees, samples, strict=True)
    ]
    here = []
    for tree, part in zip(trees, torch.cat(parts, 1).cpu().split([*map(len, trees)], 1), strict=True):
        tokens, parents, scores, sample = part
        scores = scores.int().view(torch.float32)
        here.append((DraftTree(tokens, parents, scores, tree.num_forwards), sample.tolist()))
    return [tree for tree, _ in here], [sample for _, sample in here]


def merge(trees: Sequence[DraftTree], num_nodes: int) -> DraftTree:
    """One tree of what several trees of the same root draft: the likeliest `num_nodes` nodes below the root.

    Nodes with the same path become one, as likely as it is that not all of those trees are wrong about it, as
    if none knew of another. It is never likelier than its parent, for none of them was.
    """
    tokens, parents, chances = [trees[0].lists[0][0]], [-1], [1.0]
    children: dict[tuple[int, int], int] = {}
    for tree in trees:
        merged = [0]  # the result's node for each of this tree
        for token, parent, score in islice(zip(*tree.lists, strict=True), 1, None):
            node = children.setdefault((merged[parent], token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(merged[parent])
                chances.append(0.0)
            chances[node] += math.exp(score) * (1 - chances[node])
            merged.append(node)
    best = sorted(range(1, len(tokens)), key=lambda node: -chances[node])[:num_nodes]
    kept = [0, *sorted(best)]
    place = {node: i for i, node in enumerate(kept)} | {-1: -1}
    return DraftTree(
        [tokens[node] for node in kept],
        [place[parents[node]] for node in kept],
        [math.log(chances[node] or _NEVER) for node in kept],
        sum(tree.num_forwards for tree in trees),
    )


def best_nodes(scores: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the `count` best of nodes [N] that stand level by level.

    The order is total, by score and then by index, and a parent precedes its child in it whenever its score
    is not lower, so no child is kept without its parent, ties included.
    """
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _listed(numbers: Tensor | list[Any]) -> list[Any]:
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers
