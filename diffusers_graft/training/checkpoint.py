"""Checkpoints from which a killed run goes on exactly: safetensors and JSON, complete or not there at all.

A run's folder holds `.checkpoints/stage-<name>-<step>`. Checkpoints of an earlier run in the same folder are moved to
`.checkpoints/earlier-<number>`, with the files that it saved.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..core.storage import (
    create_folder,
    pack,
    read_tensors,
    read_text,
    unpack,
    waiting_folder,
    write_tensors,
    write_text,
)
from ..errors import FileError, StateError
from .distributed import is_main_process, min_over_processes
from .fsdp import fsdp_plugin
from .sharded_tensors import PATTERN, read_shards, write_shards

# A push to the Hub leaves out what begins with a dot.
CHECKPOINTS = ".checkpoints"
TENSORS = "state.safetensors"
STRUCTURE = "state.json"

_NAME = re.compile(r"stage-(one|two)-(\d+)")
_LARGEST_STRUCTURE = 2**30


class Checkpoints:
    """The checkpoints of one stage in a folder; the newest `keep` of them stay."""

    def __init__(self, folder: Path, stage: str, keep: int):
        self.folder = Path(folder)
        self.stage = stage
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints there are, in order."""
        return [step for step, _ in _list_checkpoints(self.folder, self.stage)]

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"stage-{self.stage}-{step:08d}"

    def save(self, step: int, state: Any) -> None:
        """Write the state of a step, then remove checkpoints beyond the newest `keep`.

        One process calls this, or all together where tensors of the state are sharded over them. Raises `FileError`
        where it cannot be written; the checkpoints before it are then as they were.
        """
        structure, tensors = pack(state)
        is_sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
        if is_sharded and not is_main_process():
            self._write_own_shards(step, tensors)
            return
        path = self.path(step)
        replaced = path.with_name(f".replaced-{path.name}")
        if path.exists():
            # A damaged one, or one of the same step that an earlier resume left ahead.
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        others_wait = is_sharded
        try:
            with create_folder(path) as temporary:
                if is_sharded:
                    # The others write into the folder too, and wait until it is there.
                    others_wait = False
                    min_over_processes(1)
                    write_shards(temporary, tensors)
                else:
                    write_tensors(temporary / TENSORS, tensors)
                write_text(temporary / STRUCTURE, json.dumps(structure))
        except FileError as error:
            if others_wait:
                min_over_processes(0)
            raise FileError(self._explain_failure(step, tensors, error)) from error
        shutil.rmtree(replaced, ignore_errors=True)
        # Older ones go last, so there is one at any time.
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)

    def _write_own_shards(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        if not min_over_processes(1):
            raise FileError(f"The checkpoint of step {step} could not be written; the first process says why.")
        write_shards(waiting_folder(self.path(step)), tensors)

    def load(self, step: int, parts: Sequence[str] = ()) -> Any:
        """Return the state saved at a step. Raises `FileError` for one that is damaged, or lacks any of `parts`."""
        return load_checkpoint(self.path(step), parts)

    def _explain_failure(self, step: int, tensors: dict[str, torch.Tensor], error: FileError) -> str:
        cause = error.__cause__ or error
        if "No such file" in str(cause):
            return (
                f"The checkpoint of step {step} vanished from {self.folder} as it was written: "
                "give each run its own folder."
            )
        reason = str(cause)
        # The library that writes tensors reports a full disk in a text alone.
        if getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in reason or "os error 28" in reason:
            needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**20
            reason = f"the disk is full (it takes {needed:,.0f} MiB)"
        there = self.steps()
        before = "There is none before it"
        if there:
            before = f"The one of step {there[-1]} is intact"
        return (
            f"The checkpoint of step {step} could not be written to {self.folder}: {reason}. {before}; "
            "make room and run again with resume=True."
        )


def load_checkpoint(path: Path, parts: Sequence[str] = ()) -> Any:
    """Return the state saved in a checkpoint. Raises `FileError` for one that is damaged, or lacks any of `parts`."""
    try:
        tensors = _read_tensors(path)
        state = unpack(json.loads(read_text(path / STRUCTURE, limit=_LARGEST_STRUCTURE)), tensors)
        missing = [name for name in parts if name not in state]
    except (FileError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(
            f"The checkpoint {path} is damaged ({error}). Remove it to resume from the one before."
        ) from error
    if missing:
        raise FileError(
            f"The checkpoint {path} is damaged ({', '.join(missing)} not in {STRUCTURE}). "
            "Remove it to resume from the one before."
        )
    return state


def _read_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint; those in shards are read later, where weights are sharded now."""
    if any(path.glob(PATTERN)):
        return read_shards(path, is_sharded=fsdp_plugin() is not None)
    return read_tensors(path / TENSORS)


def find_checkpoints(resume: bool | str | Path, output_dir: str | Path | None, stage: str) -> list[Path]:
    """Return the checkpoints that a stage may resume from, the newest first; none where it starts anew.

    Args:
        resume: True for those of the run in `output_dir`; or the path of a checkpoint, which is then the only one, or
            of the folder of another run. Beside a checkpoint of the other stage, those of this stage are found.

    Raises `StateError` without a folder, and `FileError` for a path where no checkpoint is.
    """
    if resume is False or resume is None:
        return []
    if resume is True:
        if output_dir is None:
            raise StateError("There is nothing to resume from: give the output_dir that the interrupted run wrote to.")
        return _newest_first(Path(output_dir) / CHECKPOINTS, stage)
    path = Path(resume)
    match = _NAME.fullmatch(path.name)
    if match is not None and path.is_dir():
        # A path names one checkpoint, so no other is tried where it is damaged.
        return [path] if match[1] == stage else _find_beside(path, stage)
    for folder in (path / CHECKPOINTS, path):
        if any(_list_checkpoints(folder, name) for name in ("one", "two")):
            return _newest_first(folder, stage)
    raise FileError(
        f"There is no checkpoint at {path}. Give the folder of one, such as {CHECKPOINTS}/stage-{stage}-00000500, the "
        "output_dir of the run, or True for the newest one of this output_dir."
    )


def _find_beside(path: Path, stage: str) -> list[Path]:
    """Return the checkpoints of a stage beside one of the other stage."""
    found = _newest_first(path.parent, stage)
    # Stage two goes on from what stage one made, and its checkpoint alone does not say what that was.
    if stage == "one" and not found:
        raise FileError(
            f"{path} is a checkpoint of stage two, and none of stage one lies beside it. Give the trainer "
            "distill=None and the graft that stage one made, or the path of a run with both."
        )
    return found


def set_run_aside(output_dir: Path, stages: Iterable[str]) -> Path | None:
    """Move the checkpoints of some stages to a folder of their own, and what their run saved beside them.

    Returns that folder, or None where there was no checkpoint.
    """
    folder = output_dir / CHECKPOINTS
    found = [path for stage in stages for _, path in _list_checkpoints(folder, stage)]
    if not found:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    # A later save replaces these files, and the earlier run would be lost.
    for path in output_dir.iterdir():
        if path.is_file() and not path.is_symlink():
            _link_or_copy(path, aside / path.name)
    for path in found:
        path.rename(aside / path.name)
    return aside


def _link_or_copy(path: Path, other: Path) -> None:
    """Give a file a second name, which costs no room; a copy where the disk knows no second names."""
    # Files that grow in their place, as logs do, would change under both names.
    if path.suffix == ".jsonl":
        shutil.copyfile(path, other)
        return
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def _newest_first(folder: Path, stage: str) -> list[Path]:
    return [path for _, path in reversed(_list_checkpoints(folder, stage))]


def _list_checkpoints(folder: Path, stage: str) -> list[tuple[int, Path]]:
    """Return steps and folders of a stage's checkpoints, in order."""
    found = []
    for path in folder.glob(f"stage-{stage}-*"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            found.append((int(match[2]), path))
    return sorted(found)
