"""A small kind of drafter that learns: a matrix from each feature to the next. It drafts a token a cycle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from coral.data.features import FeatureBatch
from coral.decoding.state import State
from coral.drafters.kinds import Outcome
from coral.errors import CoralError
from coral.tree import DraftTree, TreeSize


@dataclass(frozen=True)
class Config:
    hidden_size: int

    def check_sizes(self, target: Any) -> None:
        if target.hidden_size != self.hidden_size:
            raise CoralError("another hidden size.")


@dataclass(frozen=True)
class Options:
    scale: float = 0.1


class Drafter(nn.Module):
    kind = "linear"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.matrix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


def layers(config: Config) -> tuple[int, ...]:
    return (-1,)


def inner(target: Any, options: Options) -> tuple[int, ...]:
    return ()


def engine_config(config: Config, dtype: torch.dtype) -> None: ...


def new(target: Any, options: Options, batch: Any, seed: int, counts: Any) -> Drafter:
    drafter = Drafter(Config(target.hidden_size))
    torch.nn.init.eye_(drafter.matrix.weight).detach().mul_(options.scale)
    return drafter


def learner(drafter: Drafter, config: Any) -> Learner:
    return Learner(drafter)


def draft(drafter: Drafter, batch: FeatureBatch, steps: int) -> Any:
    trained = batch.loss_mask[:, 1:].bool()
    drafts, features = drafter.matrix(batch.features[:, :-1].float()), batch.features[:, 1:].float()
    valid = torch.ones(1, int(trained.sum()), dtype=torch.bool)
    return SimpleNamespace(drafts=drafts[trained][None], features=features[trained], valid=valid)


class Learner(nn.Module):
    def __init__(self, drafter: Drafter) -> None:
        super().__init__()
        self.drafter = drafter

    def count(self, batch: FeatureBatch) -> Tensor:
        return batch.loss_mask[:, 1:].bool().sum()

    def forward(
        self,
        batch: FeatureBatch,
        head_weight: Tensor,
        head_bias: Tensor | None,
        generator: torch.Generator,
        progress: float = 1.0,
    ) -> Outcome:
        drafted = draft(self.drafter, batch, 1)
        loss = (drafted.drafts[0] - drafted.features).square().mean(-1).sum()
        rows = self.count(batch).float()[None]
        return Outcome(loss, {"rows": rows, "correct": torch.zeros(1), "distance": loss.detach()})


def proposer(drafter: Drafter, target: Any, head: Any, coupled: bool) -> Linear:
    return Linear(drafter, target, head)


class Linear:
    layers = (-1,)

    def __init__(self, drafter: Drafter, target: Any, head: Any) -> None:
        self.drafter, self.target, self.head = drafter, target, head

    @torch.inference_mode()
    def propose(self, states: Sequence[State], tree_size: TreeSize) -> list[DraftTree]:
        trees = []
        for state in states:
            tree = DraftTree.root(state.tokens[-1])
            if state.unread.parts and tree_size.within(state.remaining).max_depth:
                feature = self.drafter.matrix(state.unread.features[-1:])
                ids, scores = self.head.topk(feature, 1, [state], torch.zeros(1))
                tree = DraftTree([state.tokens[-1], int(ids)], [-1, 0], [0.0, float(scores)])
            state.has_read()
            trees.append(tree)
        return trees
