"""Give a small stand-in target the cost of a large one: append layers that do not change its function.

A small target's step is mostly dispatch, and its LM head is most of a draft step, so its speedup says little
about an LLM's. The appended layers add zero to the residual stream, yet cost what real layers cost. Their FFN
width sets c, the cost of a draft step over that of a plain step, to that of a real pair (Llama-3-8B 0.104).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coral.drafters.kinds import num_bytes
from coral.errors import CoralError
from coral.target.target import Target

_ZEROED = ("self_attn.o_proj", "mlp.down_proj")  # what each half of a layer adds to the residual stream
_WIDTH_MULTIPLE = 64


def deepen(
    model: PreTrainedModel, layers: int, cost_ratio: float = 0.10, drafter_bytes: int | None = None
) -> int:
    """Append decoder layers in place until the model has `layers`; its outputs stay the same, bit for bit.

    Inner weights are copies of the model's own, repeated where the FFN is wider; output projections and their
    biases are zero. The deepened model is for measuring: one config cannot say two widths, do not save it.

    Args:
        layers: total number of decoder layers afterwards.
        cost_ratio: c, the bytes of a draft step over those of a plain step, to reach by the FFN width of the
            appended layers.
        drafter_bytes: what one draft step reads, LM head included; None: an EAGLE-style drafter of one layer.

    Returns:
        The FFN width of the appended layers.

    Raises:
        CoralError: the model is that deep already, or costs too much for this ratio.
    """
    decoder, config = model.get_decoder(), model.config
    have: int = config.num_hidden_layers
    if layers <= have:
        raise CoralError(f"the target has {have} layers, so it cannot be deepened to {layers}; ask for more.")
    if not cost_ratio > 0:
        raise CoralError(f"cost_ratio is {cost_ratio}, but it must be above 0 (real pairs have about 0.10).")
    added = layers - have
    draft = drafter_bytes if drafter_bytes is not None else _eagle_bytes(model)
    each = (draft / cost_ratio - plain_bytes(model)) / added  # bytes an appended layer should have
    by_column = (num_bytes(decoder.layers[0].mlp) // config.intermediate_size) or 1
    outside_mlp = num_bytes(decoder.layers[0]) - num_bytes(decoder.layers[0].mlp)
    width = round((each - outside_mlp) / by_column / _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    if width < _WIDTH_MULTIPLE:
        raise CoralError(
            f"with {layers} layers the target already costs more than a cost ratio of {cost_ratio} asks for; "
            f"deepen to fewer layers or do without."
        )
    sources = [index % have for index in range(added)]
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [*config.layer_types[:have], *(config.layer_types[i] for i in sources)]
    wide = copy.deepcopy(config)
    wide.intermediate_size = width
    wide._attn_implementation = config._attn_implementation
    for index, source in enumerate(sources, have):
        decoder.layers.append(_idle_copy(decoder.layers[source], wide, index, config))
    return width


def append_layers(target: Target, layers: int | None, cost_ratio: float = 0.10) -> int | None:
    """Deepen a target if `layers` says so; returns the FFN width of the appended layers.

    Raises:
        CoralError: see `deepen`; the target's weights are packed blocks.
    """
    if not layers:
        return None
    if target.blocks is not None:
        raise CoralError("appended layers have no packed blocks; leave out --deepen, or use dtype auto.")
    width = deepen(target.model, layers, cost_ratio)
    target.facts = replace(target.facts, num_layers=layers)
    return width


def plain_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one plain step reads: decoder layers, final norm, LM head; no embeddings."""
    decoder = model.get_decoder()
    return num_bytes(decoder.layers) + num_bytes(decoder.norm) + num_bytes(model.get_output_embeddings())


def _eagle_bytes(model: PreTrainedModel) -> int:
    """Bytes of an EAGLE drafter's step: one layer of the target's shape, fc [h, 2h] and the LM head."""
    head = model.get_output_embeddings().weight
    fc = 2 * head.shape[1] ** 2 * head.element_size()
    return num_bytes(model.get_decoder().layers[0]) + fc + num_bytes(model.get_output_embeddings())


@torch.no_grad()
def _idle_copy(source: nn.Module, wide: object, index: int, config: object) -> nn.Module:
    """A layer with FFN width `wide.intermediate_size` that adds nothing to the residual stream."""
    like = next(source.parameters())
    with torch.device("meta"):
        layer: nn.Module = type(source)(wide, index)
    layer = layer.to(like.dtype).to_empty(device=like.device)
    weights = dict(source.named_parameters())
    for name, parameter in layer.named_parameters():
        if name.startswith(_ZEROED):
            parameter.zero_()
        else:
            parameter.copy_(_repeat(weights[name], parameter.shape))
    for module in layer.modules():  # switching the attention kernel of the model must reach these layers too
        if getattr(module, "config", None) is wide:
            module.config = config  # type: ignore[assignment]
    for name, module in layer.named_modules():  # and so must packed weights
        if isinstance(module, nn.Linear):
            module.__class__ = source.get_submodule(name).__class__  # type: ignore[assignment]
    return layer.requires_grad_(like.requires_grad).train(source.training)


def _repeat(weight: Tensor, shape: torch.Size) -> Tensor:
    """`weight` with its rows and columns repeated or cut to `shape`."""
    for dim, size in enumerate(shape):
        index = torch.arange(size, device=weight.device) % weight.shape[dim]
        weight = weight.index_select(dim, index)
    return weight
