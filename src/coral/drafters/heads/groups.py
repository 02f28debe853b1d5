"""Ways of splitting a vocabulary into equal groups, for a routed head.

All return [G, R] int64 with R = ceil(V / G); -1 fills up where G does not divide V. Ids that no group
holds are the head's core.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from coral.errors import CoralError

GROUPINGS = ("kmeans", "frequency", "contiguous")


def split(
    grouping: str,
    groups: int,
    head_weight: Tensor,
    counts: Tensor,
    seed: int = 0,
    core: Tensor | None = None,
) -> Tensor:
    """The groups that `grouping` names; head_weight [V, h], counts [V] of how often each id is written.

    Args:
        core: ids [C] that are left out of all groups.

    Raises:
        CoralError: an unknown grouping, or more groups than pairs of ids.
    """
    if core is not None and len(core):
        rest = torch.ones(len(head_weight), dtype=torch.bool).index_fill(0, core, False).nonzero().flatten()
        placed = split(grouping, groups, head_weight[rest.to(head_weight.device)], counts[rest], seed)
        return torch.where(placed < 0, placed, rest[placed])
    vocab_size = len(head_weight)
    if groups > vocab_size // 2:
        raise CoralError(f"{groups} groups are too many for {vocab_size} ids; ask for fewer.")
    match grouping:
        case "kmeans":
            return kmeans(head_weight, groups, seed=seed)
        case "frequency":
            return by_frequency(counts, groups)
        case "contiguous":
            return contiguous(vocab_size, groups)
        case _:
            raise CoralError(f"grouping {grouping!r} is not known; use {', '.join(GROUPINGS)}.")


def outside(groups: Tensor, vocab_size: int) -> Tensor:
    """The ids that no group holds, ascending, int64 [C]."""
    held = torch.zeros(vocab_size, dtype=torch.bool, device=groups.device)
    held[groups[groups >= 0]] = True
    return (~held).nonzero().flatten()


def contiguous(vocab_size: int, groups: int) -> Tensor:
    """Ids in their own order."""
    return _split(torch.arange(vocab_size), groups)


def by_frequency(counts: Tensor, groups: int) -> Tensor:
    """Bands of ids from the most to the least frequent; counts [V]."""
    return _split(counts.argsort(descending=True, stable=True), groups)


def kmeans(head_weight: Tensor, groups: int, rounds: int = 20, seed: int = 0) -> Tensor:
    """Groups of equal size whose rows of the LM head [V, h] point the same way: balanced k-means.

    In each round every row asks for the nearest centre that is not full, and a centre takes the nearest of
    the rows that ask, until all are placed. Then each centre moves to the mean of its rows.
    """
    rows = normalize(head_weight.detach().float().cpu(), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randperm(len(rows), generator=generator)[:groups]]
    for _ in range(rounds):
        placed = _place(rows @ centres.T)
        members = [(placed == group).nonzero().flatten() for group in range(groups)]
        centres = torch.stack([normalize(rows[member].mean(0), dim=-1) for member in members])
    size = -(-len(rows) // groups)
    return torch.stack([pad(member, (0, size - len(member)), value=-1) for member in members])


def _place(nearness: Tensor) -> Tensor:
    """The group [V] of each row, no group larger than ceil(V / G); nearness [V, G] is overwritten."""
    vocab_size, groups = nearness.shape
    room = torch.full((groups,), -(-vocab_size // groups))
    placed = torch.full((vocab_size,), -1)
    while (waiting := (placed < 0).nonzero().flatten()).numel():
        near, wanted = nearness[waiting].max(-1)
        for group in wanted.unique().tolist():
            asking = (wanted == group).nonzero().flatten()
            taken = asking[near[asking].argsort(descending=True)[: room[group]]]
            placed[waiting[taken]] = group
            room[group] -= len(taken)
            if room[group] == 0:
                nearness[:, group] = float("-inf")
    return placed


def _split(ids: Tensor, groups: int) -> Tensor:
    size = -(-len(ids) // groups)
    return pad(ids, (0, groups * size - len(ids)), value=-1).view(groups, size)
