"""Which target a drafter, stored features or tuned trees belong to."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from coral.errors import CoralError
from coral.json_file import Size
from coral.target.likeness import Likeness


class TargetLike(Protocol):
    """What a checkpoint asks of a target."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def head_weight(self) -> Tensor: ...


@dataclass(frozen=True)
class TargetRecord:
    """Which target a drafter belongs to. A fingerprint recognises a target whose directory was moved or
    renamed; there is one of its weights in bfloat16 and one in float16, since it may be loaded in either, and
    what one of them rounds the other cannot tell. Records of before there were two have the first. By its
    likeness the same model is known in other numbers; older records have none.
    """

    name: str
    revision: str | None
    vocab_size: Size
    hidden_size: Size
    fingerprint: str
    fingerprint_float16: str | None = None
    likeness: Likeness | None = None

    def __post_init__(self) -> None:
        if isinstance(self.likeness, dict):  # as JSON brings it
            object.__setattr__(self, "likeness", Likeness(**self.likeness))

    @classmethod
    def of(cls, target: TargetLike) -> TargetRecord:
        return cls(
            target.name,
            target.revision,
            target.vocab_size,
            target.hidden_size,
            _fingerprint(target.head_weight, torch.bfloat16),
            _fingerprint(target.head_weight, torch.float16),
            Likeness.of(target),
        )

    def has_weights_of(self, other: TargetRecord) -> bool:
        """Whether both are of the same weights, each loaded in any dtype."""
        if self.fingerprint == other.fingerprint:
            return True
        return self.fingerprint_float16 is not None and self.fingerprint_float16 == other.fingerprint_float16


def _fingerprint(head_weight: Tensor, dtype: torch.dtype) -> str:
    """A hash of 64 rows spread over the LM head [V,h], rounded to `dtype`."""
    rows = torch.linspace(0, head_weight.shape[0] - 1, 64, device=head_weight.device).long()
    sample = head_weight.detach()[rows].to(dtype).cpu().contiguous()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def check_target(directory: Path, recorded: TargetRecord, given: TargetRecord) -> None:
    """Raise CoralError unless the drafter in `directory`, of a recorded target, is for the given one."""
    for what in ("vocab_size", "hidden_size"):
        ours, theirs = getattr(recorded, what), getattr(given, what)
        if ours != theirs:
            raise CoralError(
                f"the drafter {directory} has {what} {ours}, but the target {given.name} has {theirs}; it "
                f"was trained for {recorded.name}: use that target."
            )
    if recorded.has_weights_of(given):
        return
    difference = "has other weights"
    if recorded.likeness is not None and given.likeness is not None:
        difference = recorded.likeness.difference(given.likeness) or ""
    if difference:
        revision = f" at revision {recorded.revision}" if recorded.revision else ""
        raise CoralError(
            f"the drafter {directory} was trained for the target {recorded.name}{revision}, but {given.name} "
            f"{difference}; use that target, or train a drafter for this one."
        )
    _note(
        f"{given.name} is {recorded.name} in other numbers, for which the drafter was trained: a little less "
        "of what it drafts may be accepted. The text stays the target's own."
    )


@cache
def _note(text: str) -> None:
    """Say it on standard error, once."""
    print(text, file=sys.stderr)
