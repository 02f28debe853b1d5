"""Read a drafter that other code trained, or that was exported, whatever its config.json claims to be."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coral.drafters.eagle3.fused_network import FusedDrafter
from coral.drafters.feature.network import Drafter
from coral.errors import CoralError
from coral.export import fused_read, layout, speculators
from coral.export.published import EagleTarget, open_


def read(directory: Path, target: EagleTarget) -> Drafter | FusedDrafter:
    """The drafter in a directory: plain EAGLE (so EAGLE-2, HASS, vLLM, SGLang), EAGLE-3, or what speculators
    has of both.

    Its tensors decide what it is, and are kept as they are stored.

    Raises:
        CoralError: see `open_` of `published`, and `build` of `layout` and `fused_read`; a drafter of ours;
            or what is none of these, which is named.
    """
    refuse_foreign(directory)
    stored = open_(directory)
    _refuse(directory, stored.config, stored.tensors)
    if fused_read.is_in(stored):
        return fused_read.build(stored, target)
    return layout.build(speculators.to_plain(stored) if speculators.is_in(stored) else stored, target)


def refuse_foreign(source: str | Path) -> None:
    """Raise CoralError for what can be told to be no drafter that is read here before any tensor is read."""
    place = Path(source)
    if place.is_file():
        what = "a GGUF model" if place.suffix.lower() == ".gguf" else "a file"
        raise CoralError(f"{place} is {what}, and not the directory of a drafter; {_GIVE}.")
    if not place.is_dir():
        return
    if (place / "coral" / "config.json").exists():
        raise CoralError(f"{place} is a CORAL drafter already; use it as it is.")
    if (place / "adapter_config.json").is_file():
        raise CoralError(f"{place} holds a LoRA adapter, which drafts nothing by itself; {_GIVE}.")
    for pattern in ("snapshots/*/config.json", "models--*/snapshots/*/config.json"):
        for found in place.glob(pattern):
            raise CoralError(f"{place} is a folder of the hub's cache; name the directory {found.parent}.")
    try:
        config = json.loads((place / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        config = {}  # which the reader will say
    _refuse(place, config, [file.name for file in place.iterdir()])


_GIVE = "give a drafter in the layout of EAGLE, EAGLE-2, EAGLE-3 or HASS"


def _refuse(directory: Path, config: Any, names: Iterable[str]) -> None:
    """Name what a config and the names of tensors or files are of, unless it may be EAGLE."""
    config = config if isinstance(config, dict) else {}
    inside = {str(name) for name in names}

    def holds(*parts: str) -> bool:
        return any(part in name for name in inside for part in parts)

    if "medusa_num_heads" in config or holds("medusa"):
        what = "Medusa heads, which draft without the features that ours reads"
    elif holds("lora_A", "lora_B"):
        what = "a LoRA adapter, which drafts nothing by itself"
    elif any(name.lower().endswith(".gguf") for name in inside):
        what = "a GGUF model, not a drafter"
    elif holds("layers.0.") and not holds("fc.", "fusion_fc"):
        what = "a whole language model, not a drafter: it has layers, and no fc that joins features to them"
    else:
        return
    raise CoralError(f"{directory} holds {what}; {_GIVE}.")
