"""To the Hub."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

from ..cards.card import CARD
from ..cards.user_edits import OURS, merge_edits, rename_source
from ..core.storage import finish_save
from ..errors import FileError
from .config_file import ALL_WEIGHTS, CONFIG, WEIGHTS
from .graft_folder import read_graft
from .hub_errors import HUB_ERRORS, explain
from .load_model import STEM, weight_files
from .remote_code.pack import FILE

_SHOWN = [CARD, "training.png", "samples.png", "locality.png"]
_GRAFT = [
    "graft_config*.json",
    ALL_WEIGHTS,
    "graft_proof*.safetensors",
    "graft_operator_*.py",
    *_SHOWN,
]
_WHOLE = ["config.json", f"{STEM}*.json", f"{STEM}*.safetensors", FILE, "graft_operator_*.py", *_SHOWN]


def push_graft(folder: str | Path, repo_id: str, **hub_arguments) -> str:
    """Upload a saved graft, after checking that every variant is whole; returns the address of the commit or pull
    request.

    Args:
        hub_arguments: `private`, `token`, `commit_message`, `create_pr` and `revision`.

    Raises `FileError` where the folder holds no sound graft, or the Hub refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"There is no folder {folder}. Give one that save_graft wrote.")
    finish_save(folder)
    stem, _, ending = WEIGHTS.partition(".")
    variants = [
        path.name.removeprefix(stem).removesuffix(ending).strip(".") for path in folder.glob(f"{stem}.*{ending}")
    ]
    for variant in variants or [""]:
        read_graft(folder, variant)
    return _push(folder, repo_id, _GRAFT, **hub_arguments)


def push_model(folder: Path, repo_id: str, *, variant: str | None = None, **hub_arguments) -> str:
    """Upload a whole model that was saved; other files of this variant's weights that the repository had are deleted.

    Raises `FileError` where the Hub refuses.
    """
    files = _WHOLE if _has_graft(repo_id, hub_arguments.get("token")) else [*_WHOLE, CONFIG]
    return _push(folder, repo_id, files, stale=weight_files(variant), **hub_arguments)


def _has_graft(repo_id: str, token: str | bool | None) -> bool:
    """Whether a repository holds a graft of its own, beside a whole model or without one."""
    with contextlib.suppress(*HUB_ERRORS):
        return any(_is_any(name, [ALL_WEIGHTS]) for name in HfApi(token=token).list_repo_files(repo_id))
    return False


def download_config(repo_id: str, folder: str, token: str | bool | None) -> None:
    """The `config.json` of a repository, if it has one, so that a save there keeps what it says of other variants."""
    with contextlib.suppress(*HUB_ERRORS):
        hf_hub_download(repo_id, "config.json", local_dir=folder, token=token)


def _push(
    folder: Path,
    repo_id: str,
    files: list[str],
    *,
    stale: Sequence[str] = (),
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload graft",
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Upload what this library writes, in one commit; nothing else that lies there."""
    api = HfApi(token=token)
    ours = {path.name: path for path in folder.iterdir() if path.is_file() and _is_any(path.name, files)}
    try:
        if not create_pr:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        there = api.list_repo_files(repo_id, revision=revision)
        contents = ours | ({CARD: _card(api, folder, repo_id, revision, there)} if CARD in ours else {})
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        operations += [CommitOperationDelete(name) for name in there if name not in ours and _is_any(name, stale)]
        commit = api.create_commit(
            repo_id, operations, commit_message=commit_message, create_pr=create_pr, revision=revision
        )
    except HUB_ERRORS as error:
        raise explain(error, repo_id, revision) from error
    return (commit.pr_url if create_pr else None) or commit.commit_url


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _card(api: HfApi, folder: Path, repo_id: str, revision: str | None, there: list[str]) -> bytes:
    """The card of a folder as it stands in a repository: it names that, and what a person wrote there is kept."""
    card = rename_source((folder / CARD).read_text(encoding="utf-8"), folder.resolve().name, repo_id)
    if CARD in there:
        present = Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(
            encoding="utf-8", errors="replace"
        )
        card = merge_edits(card, present) if OURS in present else card
    return card.encode()
