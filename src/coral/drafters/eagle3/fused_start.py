"""How a drafter begins: its draft vocabulary, and weights that are random or the target's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from coral.data.features import FeatureBatch
from coral.drafters import checkpoint
from coral.drafters.eagle3.fused_network import FusedConfig, FusedDrafter
from coral.drafters.eagle3.fused_options import FusedOptions
from coral.drafters.heads.vocabulary import most_frequent, special_ids
from coral.errors import CoralError

_MOST_IDS = 32_000
"""Of a draft vocabulary, unless another size is asked for."""


def layers_of(target: Any, options: FusedOptions) -> tuple[int, int, int]:
    """The layers of the target that are fused.

    Raises:
        CoralError: they are not three, or the target does not have them.
    """
    count = target.facts.num_layers
    layers = options.layers or (2, count // 2, count - 3)
    if len(set(layers)) != 3 or not 0 <= min(layers) <= max(layers) < count:
        raise CoralError(
            f"drafter.layers would be {[*layers]}, but three different ones of the target's {count} layers "
            f"are fused, 0 to {count - 1}; name three."
        )
    return layers


def new_drafter(
    target: Any, options: FusedOptions, batch: FeatureBatch, seed: int, counts: Callable[[], Tensor]
) -> FusedDrafter:
    """A drafter as `options` say. Its LM head and final norm are the target's; its other weights are a
    function of the seed and of how large the states are, of which `batch` is a sample.

    Args:
        counts: how often the target writes each id, [V].

    Raises:
        CoralError: options that do not fit the target, or a drafter to start from that does not fit them.
    """
    layers = layers_of(target, options)
    if options.init_drafter is not None:
        return _started(options.init_drafter, target, replace(options, layers=layers))
    vocabulary = target.vocab_size
    asked = options.draft_vocab_size or min(_MOST_IDS, vocabulary)
    ids = torch.arange(vocabulary)
    if asked < vocabulary:
        ids = most_frequent(counts(), special_ids(target), asked).sort().values
    config = FusedConfig.for_target(
        target.config,
        layers=layers,
        intermediate_size=options.intermediate_size or target.config.intermediate_size,
        draft_vocab_size=max(asked, len(ids)),  # there may be more special ids
        fc_norm=options.fc_norm,
        norm_output=options.norm_output,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = FusedDrafter(config)
    drafter.draft_only(ids)
    assert batch.inner is not None
    drafter.balance_states(batch.inner.cpu())
    _take_head(drafter, target, ids)
    return drafter


@torch.no_grad()
def _take_head(drafter: FusedDrafter, target: Any, ids: Tensor) -> None:
    """Copy the target's LM head, and the weights of the norm in front of it, whatever its family makes of
    them: what it gives for ones. A final norm that is spread over processes is left out.
    """
    weight = target.head_weight
    drafter.lm_head.weight.copy_(weight[ids.to(weight.device)])
    norm = getattr(target.model.get_decoder(), "norm", None)
    parameter = getattr(norm, "weight", None)
    if norm is None or parameter is None or isinstance(parameter, DTensor):
        return
    made = norm(torch.ones(1, len(parameter), dtype=parameter.dtype, device=parameter.device))[0]
    drafter.norm.weight.copy_(made)


def _started(source: str, target: Any, options: FusedOptions) -> FusedDrafter:
    drafter = checkpoint.load(source, target)
    if not isinstance(drafter, FusedDrafter):
        raise CoralError(f"{source} is a drafter of kind {drafter.kind!r}; start from another.")
    for name in ("layers", "intermediate_size", "draft_vocab_size", "fc_norm", "norm_output"):
        asked, found = getattr(options, name), getattr(drafter.config, name)
        if asked is not None and asked != found:
            raise CoralError(
                f"cannot start from {source}: its {name} is {found}, but {asked} is asked for; set "
                f"drafter.{name}."
            )
    return drafter
