"""Download of a graft into a folder of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..core.storage import create_folder
from .download import local_folder
from .graft_folder import read_graft
from .upload import GRAFT_FILES


def pull_graft(repo_id: str, folder: str | Path, **hub_arguments: Any) -> Path:
    """Download a graft with its card into a new folder, after checking that it can be read.

    Args:
        hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns the folder. Raises `FileError` where the repository holds no sound graft, or the folder is there already.
    """
    # Links of the Hub's cache, which are copied as the files they lead to.
    downloaded = local_folder(repo_id, GRAFT_FILES, **hub_arguments)
    read_graft(downloaded)
    with create_folder(folder) as temporary:
        for path in sorted(downloaded.iterdir()):
            if path.is_file():
                shutil.copyfile(path, temporary / path.name)
    return Path(folder)
