"""The `eagle` format of the speculators library, which `coral import` reads.

It is the plain EAGLE layout under other names, with one layer and without an embedding.
"""

from __future__ import annotations

from coral.errors import CoralError
from coral.export import layout
from coral.export.published import Stored

# A name there -> the drafter's.
_NAMES = {"fusion_fc.weight": "fc.weight", "fusion_fc.bias": "fc.bias"} | {
    f"transformer.{name}": f"layers.0.{name}" for name in layout.IN_EACH_LAYER
}


def is_in(stored: Stored) -> bool:
    """Whether tensors have the names of this format."""
    return "fusion_fc.weight" in stored.tensors


def to_plain(stored: Stored) -> Stored:
    """The same in the plain EAGLE layout; tensors without a place there keep their names.

    Raises:
        CoralError: config.json holds no layer's config.
    """
    config = stored.config.get("transformer_layer_config")
    if not isinstance(config, dict):
        raise CoralError(f"{stored.config_file} has no transformer_layer_config; copy the drafter again.")
    return Stored(stored.file, {_NAMES.get(name, name): t for name, t in stored.tensors.items()}, config)
