"""Whether a target is the model a drafter was made for, in other numbers: quantised or rounded.

A drafter reads ids, embeddings and features. Where shapes, family and ids are the same and the rows of
the LM head point the same way, it drafts for that target, too; how well, the acceptance length tells. The
text stays the target's own in any case.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coral.errors import CoralError

CLOSE = 0.9
"""The least cosine of the samples of two heads. SmolLM2's with itself was 1.000 in 8 bits, 0.998 in 5, 0.994
in 4 and 0.97 in 3; with its rows in another order at most 0.4.
"""
_SIDE = 32
_PROBE = (
    "The naïve café cost 1,234.50 € in 2019; isn't that 25% more?\n\n"
    "def f(x):\n\treturn [x ** 2 for _ in range(10)]  # done\n"
    'Übergröße, Привет, 你好, こんにちは, ΑΒΓ, 🙂 <b>&amp;</b> {"key": null}'
)


@dataclass(frozen=True)
class Likeness:
    """What all quantisations of a model have in common.

    family: its architecture and number of layers. ids: a hash of what its tokenizer makes of a text, or None
    where it has none. rows: 32 numbers of each of 32 rows spread over the LM head, bfloat16 in base64.
    """

    family: str
    ids: str | None
    rows: str

    @classmethod
    def of(cls, target: Any) -> Likeness:
        facts: Any = getattr(target, "facts", None)
        family = f"{facts.family} of {facts.num_layers} layers" if facts else ""
        tokenizer: Any = getattr(target, "tokenizer", None)
        ids = None
        if tokenizer is not None:
            probed = [int(i) for i in tokenizer(_PROBE, add_special_tokens=False).input_ids]
            ids = hashlib.sha256(repr(probed).encode()).hexdigest()[:16]
        return cls(family, ids, b64encode(_sample(target.head_weight)).decode())

    def difference(self, other: Likeness) -> str | None:
        """Why `other` is another model, as the end of a sentence; None: it is this one."""
        if self.family != other.family:
            return f"is a {other.family}, not a {self.family}"
        if None not in (self.ids, other.ids) and self.ids != other.ids:
            return "has another tokenizer"
        if (cosine := self.cosine(other)) < CLOSE:
            return f"has other weights (its LM head's cosine with theirs is {cosine:.2f})"
        return None

    def cosine(self, other: Likeness) -> float:
        """That of the two samples, all numbers in one vector."""
        ours, theirs = self._numbers(), other._numbers()
        if len(ours) != len(theirs):
            return 0.0
        return float(torch.dot(ours, theirs) / (ours.norm() * theirs.norm()).clamp(min=1e-30))

    def _numbers(self) -> Tensor:
        try:
            return torch.frombuffer(bytearray(b64decode(self.rows)), dtype=torch.bfloat16).float()
        except ValueError as error:
            raise CoralError(
                f"what a drafter records of its target cannot be read ({error}); copy the drafter again."
            ) from error


def _sample(head_weight: Tensor) -> bytes:
    """Of [V, h]: rows and columns spread over it, as bfloat16."""
    spread = [
        torch.linspace(0, n - 1, min(n, _SIDE)).long().to(head_weight.device) for n in head_weight.shape
    ]
    sample = head_weight.detach()[spread[0]][:, spread[1]].to(torch.bfloat16).cpu().contiguous()
    return sample.view(torch.uint8).numpy().tobytes()
