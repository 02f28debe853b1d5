"""How a drafter begins: from random weights, a layer of the target or another drafter."""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from coral.data.features import FeatureBatch
from coral.drafters import checkpoint
from coral.drafters.feature.learning_options import DrafterOptions
from coral.drafters.feature.network import Drafter, DrafterConfig
from coral.errors import CoralError


def new_drafter(target: Any, options: DrafterOptions, batch: FeatureBatch, seed: int) -> Drafter:
    """A drafter as `options` say, with weights that are a function of the seed and of how large embeddings
    and features are, of which `batch` is a sample.

    Raises:
        CoralError: a layer or drafter to start from that does not exist or does not fit.
    """
    sizes = asdict(options)
    del sizes["init_layer"], sizes["init_drafter"]
    if options.intermediate_size is None:
        sizes["intermediate_size"] = target.config.intermediate_size
    wanted, source = DrafterConfig.for_target(target.config, **sizes), None
    if options.init_drafter is not None:
        source = checkpoint.load(options.init_drafter, target)
        if not isinstance(source, Drafter):
            raise CoralError(
                f"{options.init_drafter} is a drafter of kind {source.kind!r}; start from another."
            )
        wanted = replace(source.config, **sizes)  # heads, rotary frequencies and so on stay its own
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = Drafter(wanted)
    embeddings = batch.embeddings.cpu() * wanted.embedding_scale
    drafter.balance_inputs(embeddings, batch.features.cpu())
    if options.init_layer is not None:
        layers = target.model.get_decoder().layers
        if any(isinstance(parameter, DTensor) for parameter in layers.parameters()):
            raise CoralError("drafter.init_layer needs a layer of the target whole; do not shard the target.")
        if not -len(layers) <= options.init_layer < len(layers):
            raise CoralError(
                f"drafter.init_layer is {options.init_layer}, but the target has {len(layers)} layers."
            )
        drafter.init_from_layer(layers[options.init_layer])
    if source is not None:
        drafter.init_from_drafter(source)
    return drafter
