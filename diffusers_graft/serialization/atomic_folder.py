"""Folders: replaced whole or left alone, fetched from the Hub, and never left through a name in a file."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..errors import FileError, UnknownNameError
from .hub_errors import HUB_ERRORS, explain
from .tensors import DISK_ERRORS, write_text

_STAGE, _DONE, _STALE = ".saving-", ".saved", ".stale"
_A_DAY = 86_400
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


@contextlib.contextmanager
def replacing(folder: Path, *, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write into, whose files take their places in `folder` together when the block ends, or not at all.

    One rename decides. A process killed before it leaves the old files; one killed after it leaves the new files
    waiting in `.saved`, and `settle`, which every reader calls, puts them in place.

    Args:
        stale: glob patterns of files that go when the new ones come, unless they are among these.

    Raises `FileError` where something cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file. Give a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        _sweep(folder)
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=folder))
    except OSError as error:
        raise FileError(f"{folder} cannot be written: {error}") from error
    try:
        yield stage
        names = {path.name for path in stage.iterdir()}
        old = {path.name for pattern in stale for path in folder.glob(pattern)} - names
        write_text(stage / _STALE, "\n".join(sorted(old)))
        _flush(stage)
        stage.rename(folder / _DONE)
        _flush(folder)
    except FileError:
        raise
    except DISK_ERRORS as error:
        raise FileError(
            f"{folder} could not be written: {error}. What was saved there before is unchanged."
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    settle(folder)


def settle(folder: Path) -> None:
    """Finish a save that was interrupted after it was decided."""
    done = folder / _DONE
    if done.is_symlink() or not done.is_dir():
        return
    try:
        stale = (done / _STALE).read_text(encoding="utf-8").split("\n") if (done / _STALE).is_file() else []
        for path in sorted(done.iterdir()):
            if path.name != _STALE:
                os.replace(path, folder / path.name)
        for name in filter(is_plain, stale):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(done)
    except FileNotFoundError:
        return  # another reader was faster
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{done} holds a save that was interrupted and cannot be finished: {error}") from error


def _flush(folder: Path) -> None:
    """Files and their names to the disk, in the order in which they must arrive there."""
    for path in [*folder.iterdir(), folder]:
        if path.is_dir() and path != folder:
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what processes killed before their decision have left; one that may still be writing is left alone."""
    for stage in folder.glob(f"{_STAGE}*"):
        if stage.stat().st_mtime < time.time() - _A_DAY:
            shutil.rmtree(stage, ignore_errors=True)


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in its folder: no path, nothing hidden."""
    return (
        bool(name) and name == Path(name).name and not name.startswith(".") and "\\" not in name and "\0" not in name
    )


def inside(folder: Path, name: Any) -> Path:
    """The file of that name in a folder. Raises `FileError` for a name that leads out of it, by its words or by a
    link.
    """
    if not isinstance(name, str) or not is_plain(name):
        raise FileError(
            f"{folder} names the file {name!r}, which is no plain file name. Nothing outside the folder is read."
        )
    if not (folder / name).resolve().is_relative_to(_home(folder)):
        raise FileError(
            f"{name} in {folder} is a link that leads out of the folder. Nothing outside the folder is read."
        )
    return folder / name


def _home(folder: Path) -> Path:
    """Where files of a folder may lie: in it, or, for a folder of the Hub's cache, in that of the same repository."""
    folder = folder.resolve()
    for parent in folder.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return folder


def require_source(source: Any) -> None:
    """Raise `FileError` for what is neither a folder nor the name of a repository."""
    if not isinstance(source, str | os.PathLike):
        raise FileError(
            f"What is loaded lies in a folder, or in a Hub repository user/name; got {source!r}. Give one of them."
        )


def local_folder(source: str | Path, patterns: list[str], *, subfolder: str = "", **hub_arguments: Any) -> Path:
    """A folder as it is, or the wanted files of a Hub repository.

    Args:
        patterns: names of the files that are wanted.
        subfolder: of the folder or repository.

    Raises `FileError` where there is neither, `UnknownNameError` for an argument that downloading does not take.
    """
    require_source(source)
    for name in hub_arguments:
        if name not in _DOWNLOADING:
            raise UnknownNameError("argument of loading", name, _DOWNLOADING)
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise FileError(f"The subfolder {subfolder!r} leads out of {source}.")
    if Path(source).is_dir():
        folder = Path(source) / subfolder
    else:
        if not isinstance(source, str) or source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise FileError(f"There is no folder {source}. Give one that is there, or a Hub repository user/name.")
        wanted = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        try:
            folder = Path(snapshot_download(source, allow_patterns=wanted, **hub_arguments)) / subfolder
        except HUB_ERRORS as error:
            raise explain(error, source, hub_arguments.get("revision")) from error
    if not folder.is_dir():
        raise FileError(f"There is no folder {subfolder} in {source}.")
    settle(folder)
    return folder
