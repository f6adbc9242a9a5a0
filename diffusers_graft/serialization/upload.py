"""Uploads of grafts and of full models to the Hub, each in one commit."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from ..cards.card import CARD
from ..cards.user_edits import OURS, merge_edits, rename_source
from ..core.storage import finish_save, read_text
from ..errors import FileError
from .config_file import ALL_WEIGHTS, CONFIG, WEIGHTS
from .graft_folder import read_graft
from .hub_errors import CHANGED_MEANWHILE, clean_token, explain_hub_errors, status_code
from .load_model import STEM, weight_files
from .remote_code.pack import FILE

_SHOWN = [CARD, "training.png", "samples.png", "locality.png"]
GRAFT_FILES = [
    "graft_config*.json",
    ALL_WEIGHTS,
    "graft_proof*.safetensors",
    "graft_operator_*.py",
    *_SHOWN,
]
_MODEL_FILES = ["config.json", f"{STEM}*.json", f"{STEM}*.safetensors", FILE, "graft_operator_*.py", *_SHOWN]
_ATTEMPTS = 3  # to commit, where the repository changes between reading and writing


def push_graft(folder: str | Path, repo_id: str, **hub_arguments: Any) -> str:
    """Upload a saved graft, after checking that every variant can be read.

    Args:
        hub_arguments: `private`, `token`, `commit_message`, `create_pr` and `revision`.

    Returns the address of the commit or pull request. Raises `FileError` where the folder holds no sound graft, or the
    Hub refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"There is no folder {folder}. Give one that save_graft wrote.")
    finish_save(folder)
    stem, _, ending = WEIGHTS.partition(".")
    variants = [
        path.name.removeprefix(stem).removesuffix(ending).strip(".") for path in folder.glob(f"{stem}.*{ending}")
    ]
    # a damaged graft is found before anything is uploaded
    for variant in variants or [""]:
        read_graft(folder, variant)
    return push_files(folder, repo_id, GRAFT_FILES, **hub_arguments)


def push_model(folder: Path, repo_id: str, *, variant: str | None = None, **hub_arguments: Any) -> str:
    """Upload a full model that was saved; other files of this variant's weights in the repository are deleted.

    Returns the address of the commit or pull request. Raises `FileError` where the Hub refuses.
    """
    files = list(_MODEL_FILES)
    if not _has_graft(repo_id, hub_arguments.get("token")):
        files.append(CONFIG)
    return push_files(folder, repo_id, files, stale=weight_files(variant), **hub_arguments)


def _has_graft(repo_id: str, token: Any) -> bool:
    """Return whether a repository holds a graft for a base, whose description must stay."""
    with contextlib.suppress(FileError), explain_hub_errors(repo_id):
        names = HfApi(token=clean_token(token)).list_repo_files(repo_id)
        return any(_matches(name, [ALL_WEIGHTS]) for name in names)
    return False


def download_config(repo_id: str, folder: str, token: Any) -> None:
    """Download the `config.json` of a repository, if it has one, so that a save there leaves other variants in it."""
    with contextlib.suppress(FileError), explain_hub_errors(repo_id):
        hf_hub_download(repo_id, "config.json", local_dir=folder, token=clean_token(token))


def push_files(
    folder: Path,
    repo_id: str,
    patterns: list[str],
    *,
    stale: Sequence[str] = (),
    private: bool | None = None,
    token: Any = None,
    commit_message: str = "Upload graft",
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Upload the files of a folder whose names match patterns, and delete stale ones, in one commit.

    Returns the address of the commit or pull request. Raises `FileError` where the Hub refuses.
    """
    api = HfApi(token=clean_token(token))
    settings = {"commit_message": commit_message, "create_pr": create_pr, "revision": revision}
    with explain_hub_errors(repo_id, revision):
        if not create_pr:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # somebody may edit the card on the Hub between our reading and our commit
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                commit = _commit(api, folder, repo_id, patterns, stale, **settings)
                break
            except HfHubHTTPError as error:
                if status_code(error) != CHANGED_MEANWHILE or attempt == _ATTEMPTS:
                    raise
    return (commit.pr_url if create_pr else None) or commit.commit_url


def _commit(
    api: HfApi,
    folder: Path,
    repo_id: str,
    patterns: list[str],
    stale: Sequence[str],
    *,
    revision: str | None,
    **settings: Any,
) -> CommitInfo:
    """Commit on top of the state of the repository that was read; the Hub refuses where that changed meanwhile."""
    parent = api.repo_info(repo_id, revision=revision).sha
    present = api.list_repo_files(repo_id, revision=parent)
    files = {path.name: path for path in folder.iterdir() if path.is_file() and _matches(path.name, patterns)}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name, path in files.items():
        content = path
        if name == CARD:
            content = _card(api, path, repo_id, parent, is_present=CARD in present)
        operations.append(CommitOperationAdd(name, content))
    for name in present:
        if name not in files and _matches(name, stale):
            operations.append(CommitOperationDelete(name))
    return api.create_commit(repo_id, operations, revision=revision, parent_commit=parent, **settings)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _card(api: HfApi, path: Path, repo_id: str, parent: str | None, *, is_present: bool) -> bytes:
    """Return a card for a repository: it names that, and sections that a person wrote there stay."""
    card = rename_source(read_text(path), path.parent.resolve().name, repo_id)
    if is_present:
        present = read_text(api.hf_hub_download(repo_id, CARD, revision=parent), errors="replace")
        # without our note it is the card of another tool, which ours replaces
        if OURS in present:
            card = merge_edits(card, present)
    return card.encode()
