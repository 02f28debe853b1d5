"""CORAL's head (arXiv 2502.16880, section 3.2): rows in groups, of which a router activates a few.

The core that is always active is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from coral.drafters.heads.groups import outside
from coral.drafters.heads.rows import rows_of
from coral.drafters.heads.stored import Stored
from coral.drafters.kinds import num_bytes
from coral.target.target import Target


class Router(nn.Module):
    """Predicts the target's probability mass in each of G groups of ids from a draft feature; a head's core
    counts as one.

    p = softmax(W2(act(W1 h) + h)), CORAL (arXiv 2502.16880, section 3.2). The activation is not in the paper:
    SiLU is our reading.
    """

    def __init__(self, hidden_size: int, groups: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.w2 = nn.Linear(hidden_size, groups, bias=False)
        nn.init.zeros_(self.w1.weight)  # starts as one linear layer

    def forward(self, features: Tensor) -> Tensor:
        """[..., h] -> log-mass [..., G] float32."""
        x = features.to(self.w1.weight.dtype)
        return self.w2(nn.functional.silu(self.w1(x)) + x).float().log_softmax(-1)


class RoutedHead:
    """The LM head's rows in equal groups, of which a router activates a few for each level of the tree,
    beside a core of frequent ids that is always active.

    The score of an id is its log-softmax among the active ids plus the log of the mass that the router gives
    to the core and the active groups together: nodes stay comparable whichever groups are active, and ids
    keep the order and the distances that the LM head gives them.

    Args:
        router: its outputs are the groups', and the core's if there is one.
        ids: [G, R] int64, the ids of each group; -1 fills up where G does not divide their number. Ids in no
            group are the core.
        active: groups whose rows are multiplied.
    """

    def __init__(self, target: Target, router: Router, ids: Tensor, active: int) -> None:
        weight, bias = target.head_weight, target.head_bias
        self.router = router.to(weight.device, weight.dtype).eval().requires_grad_(False)
        self.ids, self.active = ids.to(weight.device), min(active, len(ids))
        self.vocab_size = len(weight)
        self.core = outside(self.ids, self.vocab_size)
        self.core_rows = rows_of(target, self.core) if len(self.core) else None
        absent, there = self.ids < 0, self.ids.clamp(min=0)
        if bias is not None or absent.any():
            bias = weight.new_zeros(there.shape) if bias is None else bias[there]
            bias = bias.masked_fill(absent, float("-inf"))
        self.rows, self.bias = weight[there], bias  # [G, R, h], [G, R] or None
        row_bytes = weight.shape[1] * weight.element_size()
        always = num_bytes(self.router) + len(self.core) * row_bytes
        self.num_bytes = always + self.active * self.ids.shape[1] * row_bytes

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        ids, logits, offset = self._active(features, scores)
        values, best = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return ids[best].clamp(min=0), values + offset

    def table(self, state: Any) -> None:
        return None

    def log_probs(self, features: Tensor) -> Tensor:
        """[N, V] float32, of nodes that are equally likely; ids of groups that are left out have -inf."""
        ids, logits, offset = self._active(features, features.new_zeros(len(features)))
        dense = logits.new_full((len(features), self.vocab_size + 1), float("-inf"))
        dense[:, ids] = logits + offset  # where a group is filled up, its id -1 is the last place
        return dense[:, :-1]

    def _active(self, features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The active ids [A] (-1 where a group is filled up), their logits [N, A] float32, and what [N, 1] to
        add to make these log-probabilities.
        """
        mass, chosen = self.choose(features, scores)
        logits = group_logits(self.rows, self.bias, features, chosen)
        if self.core_rows is not None:
            logits = torch.cat([self.core_rows(features), logits], 1)
        logits = logits.float()
        looked_at = torch.cat([mass[:, chosen], mass[:, len(self.ids) :]], 1).logsumexp(-1, keepdim=True)
        return self.active_ids(chosen), logits, looked_at - logits.logsumexp(-1, keepdim=True)

    def choose(self, features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The log-mass [N, G] of each group (one more for the core), and the groups [active] worth most to
        these nodes together.
        """
        mass = self.router(features)
        worth = (mass[:, : len(self.ids)] + scores.to(mass)[:, None]).exp().sum(0)
        return mass, worth.topk(self.active).indices

    def active_ids(self, chosen: Tensor) -> Tensor:
        """int64 [C + active * R]: the core, then the chosen groups; -1 where a group is filled up."""
        return torch.cat([self.core, self.ids[chosen].flatten()])


def build(target: Target, stored: Stored) -> RoutedHead:
    """Of the tensors `ids` [G, R] and `router.*` and the numbers `active` and `core` (how many ids are in no
    group); raises ValueError where they are not this target's.
    """
    ids, most = stored.ids(2), target.vocab_size
    core, held = stored.number("core", 0, most, default=0), ids[ids >= 0]
    if len(held.unique()) != len(held) or int(held.max()) >= most or len(held) + core != most:
        raise ValueError(f"it does not hold each of the target's {most} ids once")
    router = Router(target.hidden_size, len(ids) + (core > 0))
    own = {name: tensor for name, tensor in stored.tensors.items() if name != "ids"}
    router.load_state_dict({name.removeprefix("router."): tensor for name, tensor in own.items()})
    return RoutedHead(target, router, ids, stored.number("active", 1, len(ids)))


def group_logits(weight: Tensor, bias: Tensor | None, features: Tensor, chosen: Tensor) -> Tensor:
    """Features [N, h] with the chosen groups [A] of weight [G, R, h] and bias [G, R]: logits [N, A * R].

    On a CPU each group is read where it lies. Elsewhere they are gathered on the device, so that the host
    need not wait to know them.
    """
    if weight.device.type == "cpu":
        biases = [None] * len(weight) if bias is None else bias
        return torch.cat([linear(features, weight[g], biases[g]) for g in chosen.tolist()], -1)
    logits = torch.einsum("nh,arh->nar", features.float(), weight[chosen].float())
    return (logits if bias is None else logits + bias[chosen]).flatten(1)
