"""The smallest kind of drafter: it drafts the last token again, has no weights and nothing to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coral.decoding.state import State
from coral.tree import DraftTree, TreeSize


@dataclass(frozen=True)
class Config:
    times: int = 3

    def check_sizes(self, target: Any) -> None: ...


class Drafter(nn.Module):
    kind = "echo"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config


Options, draft = Config, None


def layers(config: Config) -> tuple[int, ...]:
    return ()


def inner(target: Any, options: Config) -> tuple[int, ...]:
    return ()


def engine_config(config: Config, dtype: torch.dtype) -> None: ...


def new(target: Any, options: Config, batch: Any, seed: int, counts: Any) -> Drafter:
    return Drafter(Config(options.times))


def learner(drafter: Drafter, config: Any) -> None: ...


def proposer(drafter: Drafter, target: Any, head: Any, coupled: bool) -> Echo:
    return Echo(drafter.config.times)


class Echo:
    layers = ()

    def __init__(self, times: int) -> None:
        self.times = times

    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        trees = []
        for state in states:
            n = min(self.times, tree_size.within(state.remaining).max_depth, tree_size.num_nodes) + 1
            scores = [-0.1 * depth for depth in range(n)]
            trees.append(DraftTree([state.tokens[-1]] * n, [*range(-1, n - 1)], scores))
        return trees
