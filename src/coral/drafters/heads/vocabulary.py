"""Which ids a head of few ids starts from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def special_ids(target: Any) -> list[int]:
    """The target's special and end ids, ascending: an end that cannot be drafted ends no draft."""
    special: Iterable[int] = target.tokenizer.all_special_ids if target.tokenizer else ()
    return sorted(i for i in {*special, *target.eos_ids} if i < target.vocab_size)


def most_frequent(counts: Tensor, special: list[int], size: int) -> Tensor:
    """int64 [size]: the special ids, then those that are written most; counts [V].

    All special ids are in it, even if they are more than `size`. With a `size` of 0 it is empty.
    """
    order = counts.clone()
    order[special] = order.max() + 1
    return order.argsort(descending=True, stable=True)[: max(size, len(special)) if size > 0 else 0]
