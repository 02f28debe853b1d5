"""Drafters on the Hugging Face hub: downloaded, and pushed in one commit."""

from __future__ import annotations

from fnmatch import fnmatch
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

CARD = "README.md"
_LOCAL = ("coral/training/*", "coral/head_training.pt", ".cache/huggingface/*", ".gitattributes")
"""What may lie beside them and is not pushed: the state of training, and what downloads leave behind."""


def download(repo_id: str, revision: str | None = None) -> Path:
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


def parts(directory: Path) -> list[str]:
    """The files of the drafter in `directory` that are pushed, as paths within it.

    Raises:
        CoralError: a file is there that belongs to no drafter.
    """
    found = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    if foreign := _foreign(found):
        raise CoralError(
            f"{directory} holds what belongs to no drafter: {', '.join(foreign)}; move it elsewhere, so that "
            "it is not published by mistake."
        )
    return sorted(path for path in found if _matches(path, PARTS))


def push(
    directory: Path,
    repo_id: str,
    card: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload drafter",
) -> tuple[str, str]:
    """Make the repository hold the drafter in `directory` and its card, in one commit.

    What an earlier push left there is replaced: parts that the drafter no longer has are deleted.

    Args:
        card: the text of README.md, see `card.card`.
        private: of a new repository.
        revision: a branch; it is created where there is none.

    Returns:
        The commit's hash and its address.

    Raises:
        CoralError: a file belongs to no drafter, here or there; the repository is public, but was to be
            private; no permission, or no connection.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = parts(directory)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        there = api.model_info(repo_id)
        if private and not there.private:
            raise CoralError(
                f"{repo_id} is public; make it private on the hub first, or leave out --private."
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        old = api.list_repo_files(repo_id, revision=revision)
        if foreign := _foreign(old):
            raise CoralError(
                f"the repository {repo_id} holds what belongs to no drafter: {', '.join(foreign[:5])}; push "
                "to one of its own."
            )
        added = [CommitOperationAdd(path, directory / path) for path in files]
        stale = [path for path in old if _matches(path, PARTS) and path not in files]
        card_added = CommitOperationAdd(CARD, card.encode())
        deleted = [CommitOperationDelete(path) for path in stale]
        commit = api.create_commit(
            repo_id, [card_added, *added, *deleted], commit_message=message, revision=revision
        )
    except CoralError:
        raise
    except Exception as error:
        raise explained(error, f"cannot push to {repo_id!r}: ", revision) from error
    return commit.oid, commit.commit_url


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def _foreign(paths: list[str]) -> list[str]:
    return sorted(path for path in paths if not _matches(path, (*PARTS, CARD, *_LOCAL)))


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
