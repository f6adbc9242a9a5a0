"""To the Hub."""
from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from ..errors import FileError
from .asking import HUB_ERRORS, explained
from .folders import settle
from .store import read_graft

_OURS = ["*.json", "*.safetensors", "*.py", "README.md", "*.png"]


def push_graft(folder: str | Path, repo_id: str, **hub_arguments) -> str:
    """Upload a saved graft, after checking that it is whole; returns the address of the commit, or of the pull request.

    Args:
        hub_arguments: `private`, `token`, `commit_message`, `create_pr` and `revision`, as for `push_folder`.

    Raises `FileError` where the folder holds no sound graft, or the Hub refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"There is no folder {folder}. Give one that save_graft wrote.")
    settle(folder)
    read_graft(folder)
    return push_folder(folder, repo_id, **hub_arguments)


def push_folder(
    folder: Path, repo_id: str, *, private: bool | None = None, token: str | None = None,
    commit_message: str = "Upload graft", create_pr: bool = False, revision: str | None = None,
) -> str:  # fmt: skip
    """Upload what was saved, in one commit; nothing hidden, no pickles, nothing in folders below.

    Raises `FileError` where the Hub refuses; it then has none of the files.
    """
    api = HfApi(token=token)
    try:
        if not create_pr:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr, revision=revision,
            allow_patterns=_OURS, ignore_patterns=[".*", "*/*"],
        )  # fmt: skip
    except HUB_ERRORS as error:
        raise explained(error, repo_id, revision) from error
    return (commit.pr_url if create_pr else None) or commit.commit_url
