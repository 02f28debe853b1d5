"""The state of a router's training on disk: DRAFTER/coral/head_training.pt, gone once the head is written.

As in `state.py` there is no random state to keep. The groups are kept, for making them may take minutes.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coral.errors import CoralError
from coral.files import atomic_bytes
from coral.training.run_state import refuse_changed

_FILE = Path("coral") / "head_training.pt"


@dataclass
class RouterState:
    """Where the training of a router stands.

    ids: the groups, [G, R]. caught: [S, 2], what the last updates' recall is summed in. router, optimiser:
    their state dicts.
    """

    ids: Tensor
    update: int
    caught: Tensor
    router: dict[str, Tensor]
    optimiser: dict[str, Any]


def save(drafter: Path, settings: dict[str, Any], state: RouterState) -> None:
    """Write the state into a drafter's directory, in one step; raises CoralError when the disk refuses."""
    buffer = io.BytesIO()  # torch.save hides the reason of a failed write
    torch.save({"settings": settings, "state": vars(state)}, buffer)
    atomic_bytes(drafter / _FILE, buffer.getvalue())


def load(drafter: Path, settings: dict[str, Any]) -> RouterState | None:
    """The state that a stopped run left in a drafter's directory, if any.

    Raises:
        CoralError: it cannot be read, or the run was started with other settings.
    """
    path = drafter / _FILE
    if not path.exists():
        return None
    try:
        stored = torch.load(path, weights_only=True)
        before, state = dict(stored["settings"]), RouterState(**stored["state"])
        whole = state.ids.dim() == 2 and not state.ids.is_floating_point() and type(state.update) is int
        if not whole or state.update < 0 or state.caught.dim() != 2:
            raise ValueError("its parts are of other kinds")
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CoralError(f"{path} cannot be read ({reason}); remove it to start again.") from error
    refuse_changed(path, before, settings, "remove that file to start again")
    return state


def remove(drafter: Path) -> None:
    """Forget a run that has ended."""
    (drafter / _FILE).unlink(missing_ok=True)
