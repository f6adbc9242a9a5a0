"""Tensors that processes write and read shard by shard, by torch.distributed.checkpoint, as safetensors files.

Nobody ever holds all of them: each process writes its shards into a file of its own, and reads what it needs of any
file, also where there are more or fewer processes than when they were written.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..errors import FileError

# The default writer of torch.distributed.checkpoint pickles; this one, from torch 2.8 on, writes safetensors.
try:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

    CAN_WRITE = "save_distributed" in inspect.signature(HuggingFaceStorageWriter).parameters
except ImportError:
    CAN_WRITE = False

PATTERN = "shard-*.safetensors"


class StoredTensor:
    """Tensor in files, not read yet."""

    def __init__(self, folder: Path, name: str, shape: torch.Size, dtype: torch.dtype):
        self.folder = folder
        self.name = name
        self.shape = shape
        self.dtype = dtype

    def read_like(self, other: torch.Tensor) -> torch.Tensor:
        """Return the shard that this process has of another tensor, or all of it where that is not sharded.

        Raises `FileError` for files that are damaged.
        """
        if isinstance(other, DTensor) and other.shape == self.shape:
            tensor: torch.Tensor = torch.empty_like(other, dtype=self.dtype, requires_grad=False)
        else:
            tensor = torch.empty(self.shape, dtype=self.dtype, device=other.device)
        _load(self.folder, {self.name: tensor})
        return tensor


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, sharded and others, into a folder that is there; all processes call this together.

    Raises `FileError` on every process where one of them cannot write.
    """
    ready = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        dcp.save(ready, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except (CheckpointException, OSError, RuntimeError) as error:
        raise FileError(f"{folder} cannot be written: {_find_cause(error)}.") from error


def read_shards(folder: Path, *, is_sharded: bool) -> dict[str, Any]:
    """Return the tensors of a folder by name, on the host.

    Args:
        is_sharded: weights are sharded in this process, so tensors that lie in several files are not read yet.

    Raises `FileError` for files that are damaged.
    """
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:
        raise FileError(f"{folder} is damaged: {error}.") from error
    tensors: dict[str, Any] = {}
    waiting: dict[str, Any] = {}
    for name, entry in metadata.items():
        # All else is in state.json.
        assert isinstance(entry, TensorStorageMetadata)
        if is_sharded and len(entry.chunks) > 1:
            waiting[name] = StoredTensor(folder, name, entry.size, entry.properties.dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    _load(folder, tensors)
    return {**tensors, **waiting}


def _load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    if not tensors:
        return
    try:
        # Each process reads for itself, so none waits for another.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise FileError(f"{folder} is damaged: {_find_cause(error)}.") from error


def _find_cause(error: BaseException) -> Any:
    """Return the first error of a process, where several report theirs together."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error
