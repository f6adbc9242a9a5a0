"""To the Hub."""
from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..errors import FileError
from .store import read_graft


def push_graft(folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None,
               commit_message: str = "Upload graft", create_pr: bool = False) -> str:  # fmt: skip
    """Upload a saved graft, after checking that it is whole; returns the address of the commit.

    Raises `FileError` where the folder holds no sound graft, or the Hub refuses.
    """
    read_graft(Path(folder))
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr,
                                   ignore_patterns=[".*"])  # fmt: skip
    except HfHubHTTPError as error:
        raise FileError(f"The Hub refused {repo_id}: {str(error).splitlines()[0]} Look at your token and the name.") from error
    return commit.commit_url
