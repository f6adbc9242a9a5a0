"""Checkpoints that a killed run continues from, exactly: safetensors and JSON, whole or not there at all.

A checkpoint is a folder `stage-<name>-<step>`. It is written under another name and renamed when everything in it is
on the disk, so one that is there is whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import FileError

TENSORS, FACTS = "state.safetensors", "state.json"


class Checkpoints:
    """The checkpoints of one stage, the last `keep` of them, in a folder of their own."""

    def __init__(self, folder: Path, stage: str, keep: int):
        self.folder, self.stage, self.keep = Path(folder), stage, keep

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints there are, in order."""
        names = (re.fullmatch(rf"stage-{self.stage}-(\d+)", p.name) for p in self.folder.glob("stage-*"))
        return sorted(int(match[1]) for match in names if match)

    def drop(self) -> None:
        """Remove them all, and what an interrupted `save` left."""
        for path in (*map(self.path, self.steps()), *self.folder.glob(f".unfinished-{self.stage}")):
            shutil.rmtree(path)

    def path(self, step: int) -> Path:
        return self.folder / f"stage-{self.stage}-{step:08d}"

    def save(self, step: int, state: Any) -> None:
        """Write the state of a step, then drop checkpoints beyond the last `keep`.

        Raises `FileError` where it cannot be written; the checkpoints before it are then as they were.
        """
        if step in self.steps():
            return
        temporary = self.folder / f".unfinished-{self.stage}"
        tensors: dict[str, torch.Tensor] = {}
        facts = _pack(state, tensors)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(tensors, temporary / TENSORS)
            (temporary / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            for path in (temporary / TENSORS, temporary / FACTS, temporary):
                _flush(path)
            temporary.rename(self.path(step))
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise FileError(self._failure(step, tensors, error)) from error
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)

    def load(self, step: int, parts: Sequence[str] = ()) -> Any:
        """The state saved at a step. Raises `FileError` for one that is damaged, or lacks any of `parts`."""
        path = self.path(step)
        try:
            tensors = load_file(path / TENSORS)
            state = _unpack(json.loads((path / FACTS).read_text(encoding="utf-8")), tensors)
            if lacking := [name for name in parts if name not in state]:
                raise ValueError(f"{', '.join(lacking)} not in {FACTS}")
            return state
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise FileError(
                f"The checkpoint {path} is damaged ({error}). Remove it to resume from the one before."
            ) from error

    def _failure(self, step: int, tensors: dict[str, torch.Tensor], error: Exception) -> str:
        full = (
            getattr(error, "errno", None) == errno.ENOSPC
            or "No space left" in str(error)
            or "os error 28" in str(error)
        )
        needed = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
        reason = f"the disk is full (it takes {needed:,.0f} MiB)" if full else str(error)
        if "No such file" in str(error):
            return f"The checkpoint of step {step} vanished from {self.folder} as it was written: give each run its own folder."
        there = self.steps()
        before = f"The one of step {there[-1]} is intact" if there else "There is none before it"
        return (
            f"The checkpoint of step {step} could not be written to {self.folder}: {reason}. {before}; "
            "make room and run again with resume=True."
        )


def _flush(path: Path) -> None:
    """Onto the disk, contents or entries of a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON of a nested state, its tensors put aside under numbered names."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs, since JSON knows no other keys than strings
        return {"items": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, tensors) for item in value]
    return value


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _unpack(item, tensors) for key, item in value["items"]}
    return value
