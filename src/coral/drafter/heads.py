"""Heads turn draft features into draft tokens. A head can only change speed, never the output.

`topk(features [N, h], k, states, scores [N]) -> (ids [N, k] int64, log_probs [N, k] float32)`, likeliest
first. `scores` are the log-probabilities of the nodes that the features belong to, for a head that spends its
effort on the likely ones. Log-probabilities of one head are comparable across nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from coral.drafter import checkpoint
from coral.errors import CoralError
from coral.files import atomic_bytes
from coral.packed import PackedGroups, pack_linears
from coral.target import Target

HEADS = ("auto", "full", "routed")
_FILE = Path("coral") / "head.safetensors"


class Head(Protocol):
    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        """The k likeliest ids of each row and their log-probabilities."""
        ...


class FullHead:
    """The target's own LM head, all rows."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = self.log_probs(features)
        values, ids = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
        return ids, values

    def log_probs(self, features: Tensor) -> Tensor:
        """[N, V] float32."""
        return self.target.head(features).float().log_softmax(-1)


class Router(nn.Module):
    """Predicts the target's probability mass in each of G groups of ids from a draft feature.

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
    """The LM head's rows in equal groups, of which a router activates a few for each level of the tree.

    The score of an id is its group's log-mass plus its log-softmax inside the group, so nodes stay comparable
    whichever groups are active.

    Args:
        ids: [G, R] int64, the ids of each group; -1 fills up where G does not divide V.
        active: groups whose rows are multiplied.
    """

    def __init__(self, target: Target, router: Router, ids: Tensor, active: int) -> None:
        weight, bias = target.head_weight, target.head_bias
        self.router = router.to(weight.device, weight.dtype).eval().requires_grad_(False)
        self.ids, self.active = ids.to(weight.device), min(active, len(ids))
        absent, there = self.ids < 0, self.ids.clamp(min=0)
        if bias is not None or absent.any():
            bias = weight.new_zeros(there.shape) if bias is None else bias[there]
            bias = bias.masked_fill(absent, float("-inf"))
        self.rows = PackedGroups(weight[there], bias)
        pack_linears(self.router)

    def topk(self, features: Tensor, k: int, states: Sequence[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
        mass, chosen = self.choose(features, scores)
        log_probs = self._log_probs(features, mass, chosen)  # [N, active * R]
        values, best = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
        size = self.ids.shape[1]
        return self.ids[chosen[best // size], best % size].clamp(min=0), values

    def choose(self, features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The log-mass [N, G] of each group, and the groups [active] worth most to these nodes together."""
        mass = self.router(features)
        worth = (mass + scores.to(mass)[:, None]).exp().sum(0)
        return mass, worth.topk(self.active).indices

    def log_probs(self, features: Tensor) -> Tensor:
        """[N, V] float32 with every group active, for tests."""
        scores = self._log_probs(features, self.router(features), torch.arange(len(self.ids)))
        dense = scores.new_empty(len(features), int(self.ids.max()) + 1)
        there = self.ids.flatten() >= 0
        dense[:, self.ids.flatten()[there]] = scores[:, there]
        return dense

    def _log_probs(self, features: Tensor, mass: Tensor, groups: Tensor) -> Tensor:
        """[N, A * R] float32, of the ids in these A groups."""
        inside = self.rows(features, groups.tolist()).float().log_softmax(-1)  # [A, N, R]
        return inside.add_(mass[:, groups].T[:, :, None]).transpose(0, 1).flatten(1)


def save(directory: Path, router: Router, ids: Tensor, active: int) -> None:
    """Write a routed head into a drafter's directory, in one step.

    Raises:
        CoralError: the disk refuses.
    """
    tensors = {
        f"router.{name}": tensor.detach().cpu().contiguous() for name, tensor in router.state_dict().items()
    }
    metadata = {"kind": "routed", "active": str(active)}
    atomic_bytes(directory / _FILE, serialise({**tensors, "ids": ids.to(torch.int32)}, metadata))


def load(
    source: str | Path,
    target: Target,
    which: str = "auto",
    active: int | None = None,
    revision: str | None = None,
) -> Head:
    """The head of a drafter: "full", "routed", or "auto" for the one that lies in its directory, else full.

    Args:
        active: groups whose rows are multiplied; None: what the head was saved with.

    Raises:
        CoralError: an unknown head, none in the directory, or one for another vocabulary.
    """
    if which not in HEADS:
        raise CoralError(f"head {which!r} is not known; use {', '.join(HEADS)}.")
    path = checkpoint.locate(source, revision) / _FILE
    if which == "full" or (which == "auto" and not path.exists()):
        return FullHead(target)
    if not path.exists():
        raise CoralError(
            f"the drafter {source} has no routed head; make one with `coral train-head {source}`."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ids, kept = tensors.pop("ids").long(), int(metadata["active"])
        router = Router(target.hidden_size, len(ids))
        router.load_state_dict({name.removeprefix("router."): tensor for name, tensor in tensors.items()})
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CoralError(f"{path} cannot be read ({str(error).strip()}); make it again.") from error
    if sorted(ids[ids >= 0].tolist()) != list(range(target.vocab_size)):
        raise CoralError(
            f"{path} does not hold each of the target's {target.vocab_size} ids once; make it again."
        )
    return RoutedHead(target, router, ids, active or kept)
