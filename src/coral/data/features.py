"""Feature batches: what training reads. The rows of prepared data either hold the target's features (see
`coral.data.shards`), or the target computes them now.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from coral.errors import CoralError


class FeatureSource(Protocol):
    """What feature batches ask of a target."""

    @property
    def device(self) -> torch.device: ...

    @property
    def vocab_size(self) -> int: ...

    def states(
        self, input_ids: Tensor, document_starts: Tensor | None = None, layers: tuple[int, ...] = (-1,)
    ) -> Tensor: ...

    def embed(self, ids: Tensor) -> Tensor: ...


class Rows(Protocol):
    """Prepared rows: a mapping with input_ids, loss_mask, document_starts for each index, and perhaps
    `states`, features and then what enters each layer that is asked for, [n+1,L,h].
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class FeatureBatch:
    """B rows of length L, padded at the right, where no causal row sees it and none is trained; or, joined,
    one row that holds them one after the other (B is 1).
    """

    rows: list[int]
    """Where the rows stand in the prepared data."""
    input_ids: Tensor
    """int64 [B,L]."""
    loss_mask: Tensor
    """bool [B,L], True where the token is one that the target is to write."""
    document_starts: Tensor | None
    """bool [B,L], True where a packed document starts; None when every row is one document."""
    features: Tensor
    """The target's feature of each token, [B,L,h], in the target's dtype or the one they were stored in."""
    embeddings: Tensor
    """The embedding of the token after each, [B,L,h] in the target's dtype (the last one stands for nothing,
    nor does a document's)."""
    inner: Tensor | None = None
    """States from within the target, [B,L,n*h]: side by side what enters each of n layers, see
    `Target.states`. None where no layer was asked for."""


def feature_batch(
    target: FeatureSource,
    dataset: Rows,
    rows: Sequence[int],
    inner: tuple[int, ...] = (),
    *,
    joined: bool = False,
) -> FeatureBatch:
    """Read rows of prepared data, each cut after its last trained token, with the target's features.

    The target runs on rows that do not hold their features. Where they do, the padding's features are zeros.

    Args:
        inner: the layers whose incoming states are wanted, too; a dataset that holds states holds these.
        joined: put the rows one after the other, as packed documents: nothing is padded, so a CPU computes
            nothing in vain. A GPU, which is faster at few large rows than at many short ones, pads.

    Raises:
        CoralError: a token id that the target does not have.
    """
    examples = [dataset[row] for row in rows]
    lengths = [used_length(example["loss_mask"]) for example in examples]
    joined = joined and len(rows) > 1
    shape = (1, max(2, sum(lengths))) if joined else (len(rows), max(2, *lengths))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    document_starts = torch.zeros(shape, dtype=torch.bool)
    stored = examples[0].get("states")
    states = torch.zeros(0) if stored is None else stored.new_zeros(*shape, len(stored) * stored.shape[2])
    i = begin = 0
    for example, length in zip(examples, lengths, strict=True):
        place = i, slice(begin, begin + length)
        input_ids[place] = torch.as_tensor(example["input_ids"])[:length]
        loss_mask[place] = torch.as_tensor(example["loss_mask"])[:length].bool()
        starts = torch.as_tensor(example["document_starts"])
        document_starts[i, begin + starts[starts < length].long()] = True
        if stored is not None:
            states[place] = example["states"][:, :length].transpose(0, 1).flatten(1)
        i, begin = (i, begin + length) if joined else (i + 1, 0)
    if int(input_ids.max()) >= target.vocab_size:
        raise CoralError(
            f"the prepared data holds the token id {int(input_ids.max())}, but the target's vocabulary ends "
            f"at {target.vocab_size - 1}; prepare the data with the target's own tokenizer."
        )
    packed = bool(document_starts[:, 1:].any())
    input_ids, loss_mask = input_ids.to(target.device), loss_mask.to(target.device)
    starts_given = document_starts.to(target.device) if packed else None
    if stored is None:
        states = target.states(input_ids, starts_given, (-1, *inner))
    states = states.to(target.device)
    width = states.shape[-1] // (1 + len(inner))
    return FeatureBatch(
        rows=list(rows),
        input_ids=input_ids,
        loss_mask=loss_mask,
        document_starts=starts_given,
        features=states[..., :width],
        inner=states[..., width:] if inner else None,
        embeddings=target.embed(input_ids.roll(-1, dims=1)),
    )


def used_length(loss_mask: Sequence[int]) -> int:
    """Tokens of a row up to its last trained one, which is all that training reads; 0 if there is none."""
    trained = torch.as_tensor(loss_mask).bool().nonzero()
    return int(trained[-1]) + 1 if len(trained) else 0


def frequencies(dataset: Rows, vocab_size: int) -> Tensor:
    """How often the target writes each id in prepared data, [V]."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for index in range(len(dataset)):
        example = dataset[index]
        written = torch.as_tensor(example["input_ids"])[torch.as_tensor(example["loss_mask"]).bool()]
        counts += torch.bincount(written, minlength=vocab_size)
    return counts
