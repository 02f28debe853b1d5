"""Read a drafter that other code trained, or that was exported, whatever its config.json claims to be."""

from __future__ import annotations

from pathlib import Path

from coral.drafter import eagle
from coral.drafter.drafter import Drafter
from coral.errors import CoralError
from coral.export import speculators


def read(directory: Path, target: eagle.EagleTarget) -> Drafter:
    """The drafter in a directory: plain EAGLE (so EAGLE-2, HASS, vLLM, SGLang), or speculators' `eagle`.

    Its tensors decide what it is, and are kept as they are stored.

    Raises:
        CoralError: see `coral.drafter.eagle.open_` and `build`; or a drafter of ours.
    """
    if (directory / "coral" / "config.json").exists():
        raise CoralError(f"{directory} is a CORAL drafter already; use it as it is.")
    stored = eagle.open_(directory)
    return eagle.build(speculators.to_plain(stored) if speculators.is_in(stored) else stored, target)
