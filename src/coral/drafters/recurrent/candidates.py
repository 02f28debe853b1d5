"""A batch's candidates: the ids that draft steps are scored on in place of the whole vocabulary.

The losses of draft steps are sums over ids, p(x) of the target's and log q(x) of the drafter's softmax. Here
they run over the ids that hold most of the target's probability in the batch, its own tokens among them, and
over ids drawn evenly from all others, each of which stands for as many as it was drawn from: n of N drawn
ids count N/n times. So every sum of the kind "over x of w(x) exp(logit)" is unbiased, normalisers of both
softmaxes included, and their ratios, which the losses are made of, are consistent: importance sampling, as in
sampled softmax (Jean et al., arXiv 1412.2007). To count an id w times is to add log w to its logit, so the
candidates are a head of fewer rows with a bias, and a drafter that equals its target still has no slope.

The target's whole head is multiplied once, for some of the rows, whatever the number of draft steps.

Shapes: R trained rows, V vocabulary, C candidates, h hidden size.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SURVEYED = 256
"""About how many rows of a batch meet the whole head, which shows which ids hold most of the probability.
With all rows this product would be most of a batch's cost; the estimates are unbiased whichever ids are
certain."""


class Candidates(NamedTuple):
    """A head of C rows that stands for one of V."""

    ids: Tensor
    """int64 [C], each once; the certain ones first."""
    weight: Tensor
    """Their rows of the head, [C,h]."""
    bias: Tensor
    """Float32 [C]: the head's, and the log of how often an id counts."""
    often: Tensor
    """That log alone, float32 [C]."""
    certain: int
    """How many of them, from the first and in rising order, stand for themselves only."""

    def places(self, tokens: Tensor) -> Tensor:
        """Where certain ids stand among the candidates."""
        return torch.searchsorted(self.ids[: self.certain], tokens)


@torch.no_grad()
def choose(
    features: Tensor,
    tokens: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    size: int,
    generator: torch.Generator,
    chunk: int,
) -> Candidates:
    """About `size` candidates, a quarter of them drawn.

    Args:
        features: the target's, [R,h].
        tokens: ids that must be certain, int64 [R]; if they are too many, there are more candidates.
        generator: a CPU generator that draws.
        chunk: rows that meet the whole head at a time.
    """
    vocabulary, device = len(head_weight), features.device
    mass = torch.zeros(vocabulary, device=device)
    every = max(1, len(features) // SURVEYED)
    for rows in features[::every].split(chunk):
        logits = rows.to(head_weight.dtype) @ head_weight.t()
        logits = logits if head_bias is None else logits.add_(head_bias)
        p = torch.softmax(logits, -1, out=logits)
        mass += (p.new_ones(1, len(p)) @ p)[0]  # a CPU sums columns slowly
    mass[tokens] += 2 * len(features)  # more than any other can have
    order = mass.argsort(descending=True, stable=True)
    certain = min(vocabulary, max(size - size // 4, len(tokens.unique())))
    others = vocabulary - certain
    drawn = min(others, size // 4)
    chosen = torch.randperm(others, generator=generator)[:drawn].sort().values.to(device)
    ids = torch.cat([order[:certain].sort().values, order[certain:][chosen]])
    often = torch.zeros(len(ids), device=device)
    if drawn:
        often[certain:] = math.log(others / drawn)
    bias = often if head_bias is None else often + head_bias[ids].float()
    return Candidates(ids, head_weight[ids], bias, often, certain)
