"""Push a drafter to the Hugging Face hub, in one commit."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from coral.errors import CoralError
from coral.target.download import PARTS, explained

CARD = "README.md"
_LOCAL = ("coral/training/*", ".cache/huggingface/*", ".gitattributes")
"""What may lie beside them and is not pushed: the state of training, and what downloads leave behind."""


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
