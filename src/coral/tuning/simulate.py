"""Decoding with any tree size, from what was recorded: exact counts of cycles, draft steps and nodes.

A smaller tree is grown again out of the recorded one as the proposer grows it (see `proposers/feature.py`):
a node's children are its best top_k, the best top_k of a level are expanded, a level whose best node is less
likely than min_gain ends the growth, and the best num_nodes in the total order of `tree.best_nodes` stay, but
for those less likely than min_gain. Where a smaller top_k would expand a node that the recorded tree did not,
the node stays a leaf.

Shapes: N positions of all texts, D levels, W nodes of the widest level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from coral.tree import DraftTree, TreeSize
from coral.tuning.recording import Text

_Key = TypeVar("_Key")
_FAR = 2**30  # the rank of a node that is not there


@dataclass(frozen=True)
class Simulated:
    """Counts of decoding all texts with a tree size.

    tokens: written, the same for every tree size. tau: acceptance length. steps: draft steps.
    rows: [most + 1] how many cycles verified a tree of so many rows, root included.
    """

    tree_size: TreeSize
    tokens: int
    cycles: int
    tau: float
    steps: int
    rows: Tensor


def simulate(texts: Sequence[Text], tree_sizes: Sequence[TreeSize]) -> list[Simulated]:
    """Simulate every tree size, none larger than what was recorded, on all texts."""
    pools, ends = _stack(texts)
    count, positions = len(tree_sizes), len(pools.limit)
    accepted = torch.zeros(count, positions, dtype=torch.int64)
    nodes, steps = torch.zeros_like(accepted), torch.zeros_like(accepted)
    everywhere = torch.arange(positions)
    for top_k, of_width in _group(range(count), lambda i: tree_sizes[i].top_k).items():
        growth = _grow(pools, top_k)
        shapes = _group(of_width, lambda i: (tree_sizes[i].within(_FAR).max_depth, tree_sizes[i].min_gain))
        for (max_depth, min_gain), members in shapes.items():
            most = pools.limit.clamp(max=max_depth)
            levels = torch.minimum(_levels(growth.best, min_gain), most)  # [N]
            grown, last = levels > 0, (levels - 1).clamp(min=0)
            least = math.log(min_gain) if min_gain else -torch.inf
            sizes = (growth.scores >= least).sum(2).cumsum(1)[everywhere, last] * grown  # [N]
            there = grown[:, None] & (growth.path_scores >= least)
            ranks = growth.ranks[everywhere, last].masked_fill(~there, _FAR)  # [N, D]
            num_nodes = torch.tensor([tree_sizes[i].num_nodes for i in members])
            accepted[members] = (ranks < num_nodes[:, None, None]).sum(2)
            nodes[members] = torch.minimum(sizes, num_nodes[:, None])
            steps[members] = levels
    visited = _walk(accepted, ends)
    cut = accepted == ends - everywhere  # the whole rest was on the path, so the text ended inside it
    whole = visited & ~cut
    taus = ((accepted + 1) * whole).sum(1) / whole.sum(1)
    return [
        Simulated(
            tree_size,
            positions,
            int(visited[i].sum()),
            float(taus[i]),
            int(steps[i][visited[i]].sum()),
            torch.bincount(nodes[i][visited[i]] + 1),
        )
        for i, tree_size in enumerate(tree_sizes)
    ]


def _group(indices: Iterable[int], key: Callable[[int], _Key]) -> dict[_Key, list[int]]:
    groups: dict[_Key, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return groups


class _Pools(NamedTuple):
    """The recorded trees, level by level; all tensors are [N, D, W] but the last two.

    there: whether there is such a node; tokens: its id; parents: the place of its parent in the level above;
    order: how many siblings are likelier; scores: float32, finite.
    following [N, D]: the text from here on, -1 behind its end. limit [N]: levels that may be grown.
    """

    there: Tensor
    tokens: Tensor
    parents: Tensor
    order: Tensor
    scores: Tensor
    following: Tensor
    limit: Tensor


def _stack(texts: Sequence[Text]) -> tuple[_Pools, Tensor]:
    """All positions of all texts, and for each the position behind the end of its text, [N]."""
    pools = [_places(pool) for text in texts for pool in text.pools]
    depth = max((int(p.depth.max()) for p in pools if len(p.depth)), default=1)
    width = max((int(p.place.max()) + 1 for p in pools if len(p.depth)), default=1)
    shape = len(pools), depth, width
    at = (
        torch.cat([torch.full_like(p.depth, n) for n, p in enumerate(pools)]),
        torch.cat([p.depth for p in pools]) - 1,
        torch.cat([p.place for p in pools]),
    )
    tokens, parents, order = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    there, scores = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -torch.inf)
    there[at] = True
    tokens[at] = torch.cat([p.tokens for p in pools])
    parents[at] = torch.cat([p.parent for p in pools])
    order[at] = torch.cat([p.order for p in pools]).float()
    scores[at] = torch.cat([p.scores for p in pools]).clamp(min=-1e30)
    following, limit = [], []
    ends: list[int] = []
    for text in texts:
        padded = torch.tensor([*text.tokens, *[-1] * depth])
        following.append(padded.unfold(0, depth, 1)[: len(text.tokens)])
        ends += [len(ends) + len(text.tokens)] * len(text.tokens)
        limit += [min(depth, text.room - i - 1) if len(pool) > 1 else 0 for i, pool in enumerate(text.pools)]
    made = _Pools(there, tokens, parents, order, scores, torch.cat(following), torch.tensor(limit))
    return made, torch.tensor(ends)


class _Places(NamedTuple):
    """One tree without its root: each node's depth, place in its level, and so on; see `_Pools`."""

    depth: Tensor
    place: Tensor
    tokens: Tensor
    parent: Tensor
    order: Tensor
    scores: Tensor


def _places(tree: DraftTree) -> _Places:
    depth, above = torch.zeros(len(tree), dtype=torch.int64), tree.parents.clamp(min=0)
    while not torch.equal(deeper := (depth[above] + 1).index_fill_(0, torch.tensor([0]), 0), depth):
        depth = deeper
    place = _number(depth)
    likeliest_first = torch.argsort(tree.scores[1:], descending=True, stable=True)
    order = torch.empty(len(tree) - 1, dtype=torch.int64)
    order[likeliest_first] = _number(tree.parents[1:][likeliest_first])
    return _Places(depth[1:], place[1:], tree.tokens[1:], place[above][1:], order, tree.scores[1:])


def _number(groups: Tensor) -> Tensor:
    """How many earlier items are in the same group, [n] -> [n]."""
    order = torch.argsort(groups, stable=True)
    ordered = groups[order]
    numbers = torch.empty_like(groups)
    numbers[order] = torch.arange(len(groups)) - torch.searchsorted(ordered, ordered)
    return numbers


class _Growth(NamedTuple):
    """The trees that one top_k grows, at each position.

    best [N, D]: score of the likeliest node of a level.
    scores [N, D, W]: of nodes that are grown; NaN where there is none.
    ranks [N, D, D]: in the tree of the first i + 1 levels, the rank in the total order of the node of depth
    j + 1 on the text's own path; _FAR where there is none. path_scores [N, D]: that node's.
    """

    best: Tensor
    scores: Tensor
    ranks: Tensor
    path_scores: Tensor


def _grow(pools: _Pools, top_k: int) -> _Growth:
    count, depth, width = pools.there.shape
    kept, likeliest = torch.zeros_like(pools.there), torch.zeros(count, depth)
    path, path_scores = torch.full((count, depth), -1), torch.zeros(count, depth)
    expanded, here = torch.ones(count, 1, dtype=torch.bool), torch.zeros(count, 1, dtype=torch.int64)
    for level in range(depth):
        parents, scores = pools.parents[:, level], pools.scores[:, level]
        inside = pools.there[:, level] & (pools.order[:, level] < top_k) & expanded.gather(1, parents)
        best = scores.masked_fill(~inside, -torch.inf).topk(min(top_k, width)).indices
        expanded = torch.zeros_like(inside).scatter_(1, best, True) & inside
        likeliest[:, level] = scores.masked_fill(~expanded, -torch.inf).amax(1)
        hit = inside & (pools.tokens[:, level] == pools.following[:, level, None]) & (parents == here)
        here = torch.where(hit.any(1), hit.int().argmax(1), -1)[:, None]
        kept[:, level], path[:, level] = inside, here[:, 0]
        path_scores[:, level] = scores.gather(1, here.clamp(min=0))[:, 0]
    before = torch.zeros(count, depth, depth, dtype=torch.int64)  # node of the path, level that precedes it
    places = torch.arange(width)
    for node in range(depth):
        score = path_scores[:, node, None]
        for level in range(depth):
            scores = pools.scores[:, level]
            tied = level < node if level != node else places < path[:, node, None]
            precedes = kept[:, level] & ((scores > score) | ((scores == score) & tied))
            before[:, node, level] = precedes.sum(1)
    ranks = before.cumsum(2)
    below = torch.arange(depth)[:, None] > torch.arange(depth)  # this node is deeper than so many levels
    ranks = ranks.masked_fill(below | (path < 0)[:, :, None], _FAR)
    return _Growth(likeliest, pools.scores.masked_fill(~kept, torch.nan), ranks.transpose(1, 2), path_scores)


def _levels(best: Tensor, min_gain: float) -> Tensor:
    """How many levels are grown until one has no node that is likely enough, [N, D] -> [N]."""
    least = math.log(min_gain) if min_gain else -torch.inf
    enough = torch.cat([best >= least, torch.zeros(len(best), 1, dtype=torch.bool)], 1)
    return (~enough).int().argmax(1) + 1


def _walk(accepted: Tensor, ends: Tensor) -> Tensor:
    """[tree_sizes, N] accepted, [N] ends -> where cycles begin, [tree_sizes, N] bool."""
    visited = torch.zeros_like(accepted, dtype=torch.bool)
    start = 0
    for position, end in enumerate(ends.tolist()):
        if position == start:  # of a text
            visited[:, position], start = True, end
        behind = position + 1 + accepted[:, position]
        going = (visited[:, position] & (behind < end)).nonzero()[:, 0]
        visited[going, behind[going]] = True
    return visited
