"""From the Hugging Face hub: drafters, and what its errors mean."""

from __future__ import annotations

from pathlib import Path

from coral.errors import CoralError

PARTS = (
    "config.json",
    "model.safetensors",
    "coral/config.json",
    "coral/trees.json",
    "coral/heads/own",
    "coral/heads/*.safetensors",
    "coral/heads/token_map.pt",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
)
"""The files of a drafter."""


def drafter(repo_id: str, revision: str | None = None) -> Path:
    """The local directory of a drafter on the hub, downloaded unless it is in the cache.

    Raises:
        CoralError: no such repository or revision, no permission, or no connection.
    """
    from huggingface_hub import snapshot_download

    patterns = [*PARTS, "*.json", "*.safetensors", "pytorch_model.bin"]  # the last three: published by EAGLE
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise explained(error, f"no drafter {repo_id!r}: no such directory, and ", revision) from error


def explained(error: Exception, what: str, revision: str | None) -> CoralError:
    """What the hub's client raised, as one sentence with what to do about it."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    match error:
        case errors.GatedRepoError():
            reason = "the hub asks for its terms to be accepted; do that on its page, then `hf auth login`"
        case errors.RevisionNotFoundError():
            reason = f"the hub has no revision {revision!r} of it; see the branches and tags on its page"
        case errors.HfHubHTTPError() if status in (401, 403) and "Repository Not Found" not in str(error):
            reason = "the hub refuses the access token; log in with one that may do this: `hf auth login`"
        case errors.RepositoryNotFoundError():
            reason = (
                "the hub has no such repository, or it is private; check the name, and log in with "
                "`hf auth login` if it is private"
            )
        case errors.HFValidationError():
            reason = "that is no name of a repository; write it as OWNER/NAME"
        case errors.LocalTokenNotFoundError():
            reason = "nobody is logged in; run `hf auth login`"
        case errors.HfHubHTTPError():
            reason = f"the hub answers {status}: {_line(error)}; try again later"
        case errors.OfflineModeIsEnabled():
            reason = "HF_HUB_OFFLINE is set; unset it to reach the hub"
        case errors.LocalEntryNotFoundError() if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            reason = "it was not downloaded before, and HF_HUB_OFFLINE is set; unset it to reach the hub"
        case ValueError():  # what the client itself refuses, the card's metadata for example
            reason = _line(error)
        case _ if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
            reason = f"the hub cannot be reached ({_line(error)}); check the network and HF_ENDPOINT"
        case _:
            reason = f"the hub's client stops with {type(error).__name__}: {_line(error)}"
    return CoralError(f"{what}{reason}.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
