"""The folder that is loaded: one of this machine, or files of a Hub repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

from ..core.storage import finish_save, is_plain_name
from ..errors import FileError, UnknownNameError
from .hub_errors import clean_token, explain_hub_errors

_DOWNLOADING = (
    "cache_dir",
    "endpoint",
    "etag_timeout",
    "force_download",
    "local_files_only",
    "max_workers",
    "revision",
    "token",
)


def require_source(source: Any) -> None:
    """Raise `FileError` for what is neither a folder nor the name of a repository."""
    if not isinstance(source, str | os.PathLike):
        raise FileError(
            f"What is loaded lies in a folder, or in a Hub repository user/name; got {source!r}. Give one of them."
        )


def local_folder(source: str | Path, patterns: list[str], *, subfolder: str | None = "", **hub_arguments: Any) -> Path:
    """Return a folder as it is, or download files of a Hub repository.

    Args:
        patterns: names of the files that are wanted.
        subfolder: of the folder or repository.

    Raises `FileError` where there is neither, `UnknownNameError` for an argument that downloading does not take.
    """
    require_source(source)
    # Also for folders: a misspelt argument should not wait for a repository to be noticed.
    for name in hub_arguments:
        if name not in _DOWNLOADING:
            raise UnknownNameError("argument of loading", name, _DOWNLOADING)
    subfolder = _checked_subfolder(subfolder, source)
    if Path(source).is_dir():
        folder = Path(source) / subfolder
    else:
        folder = _downloaded(source, patterns, subfolder, hub_arguments)
    if not folder.is_dir() and not subfolder:
        raise FileError(f"{source} holds none of the files {', '.join(patterns)}.")
    if not folder.is_dir():
        raise FileError(f"There is no folder {subfolder} in {source}.")
    # A save that was interrupted after its decision is the newer one.
    finish_save(folder)
    return folder


def _checked_subfolder(subfolder: Any, source: str | Path) -> str:
    """Return a subfolder, empty for None. Raises `FileError` for one that leads elsewhere."""
    if subfolder is None:
        return ""
    if not isinstance(subfolder, str | os.PathLike):
        raise FileError(f"A subfolder is a folder's name in {source}; got {subfolder!r}. Leave it out, or give one.")
    path = Path(subfolder)
    if path.is_absolute() or ".." in path.parts:
        raise FileError(f"The subfolder {str(subfolder)!r} leads out of {source}.")
    return str(subfolder)


def _downloaded(source: str | Path, patterns: list[str], subfolder: str, hub_arguments: dict[str, Any]) -> Path:
    repo_id = str(source)
    is_repository = isinstance(source, str) and repo_id.count("/") == 1 and not repo_id.startswith((".", "/", "~"))
    if not is_repository:
        raise FileError(f"There is no folder {source}. Give one that is there, or a Hub repository user/name.")
    wanted = patterns
    if subfolder:
        wanted = [f"{subfolder}/{pattern}" for pattern in patterns]
    if "token" in hub_arguments:
        hub_arguments = {**hub_arguments, "token": clean_token(hub_arguments["token"])}
    with explain_hub_errors(repo_id, hub_arguments.get("revision")):
        return Path(snapshot_download(repo_id, allow_patterns=wanted, **hub_arguments)) / subfolder


def file_in(folder: Path, name: Any) -> Path:
    """Return the path of a file that a description names.

    Raises `FileError` for a name that leads out of the folder, by its words or by a link.
    """
    if not isinstance(name, str) or not is_plain_name(name):
        raise FileError(
            f"{folder} names the file {name!r}, which is not a plain file name. Nothing outside the folder is read."
        )
    try:
        target = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise FileError(f"{folder} names the file {name!r}, which no disk can hold: {error}.") from error
    if not target.is_relative_to(_home(folder)):
        raise FileError(
            f"{name} in {folder} is a link that leads out of the folder. Nothing outside the folder is read."
        )
    return folder / name


def _home(folder: Path) -> Path:
    """Return where files of a folder may lie: in it, or in the repository's folder of the Hub's cache."""
    folder = folder.resolve()
    for parent in folder.parents:
        # The files of a snapshot are links into the repository's `blobs`.
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return folder


def list_repository(repo_id: str, revision: str | None = None) -> dict[str, int]:
    """Return the files of a Hub repository with their bytes, without those that are in the cache already.

    Raises `FileError` where the Hub cannot be reached, or has no such repository.
    """
    with explain_hub_errors(repo_id, revision):
        found = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {one.rfilename: one.size or 0 for one in found.siblings or ()}
    return {
        name: size
        for name, size in sizes.items()
        if not isinstance(try_to_load_from_cache(repo_id, name, revision=found.sha), str)
    }
