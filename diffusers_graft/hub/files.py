"""Writing so that nothing saved is ever lost, and reading so that nothing damaged is ever used."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import FileError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path`, flush to disk, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path} could not be written: {error}. What was saved there before is unchanged.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(ready, temporary, metadata={"format": "pt", **header}))


def read_header(path: Path) -> dict[str, str]:
    """The header of a safetensors file. Raises `FileError` for one that is missing or damaged."""
    return _read(path, lambda file: file.metadata() or {})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on CPU. Raises `FileError` for one that is missing or damaged."""
    return _read(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def _read(path: Path, read: Callable[[Any], Any]) -> Any:
    if not path.is_file():
        raise FileError(f"There is no {path.name} in {path.parent}.")
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged ({error}). Download or save it again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises `FileError` for a file that is missing or no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"There is no {path.name} in {path.parent}.") from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise FileError(f"{path} is damaged: it holds no JSON object.")
    return data


def digest(tensors: Mapping[str, torch.Tensor], *, as_bfloat16: bool = False) -> str:
    """SHA-256 over names, shapes and values, in the order of names.

    With `as_bfloat16` floating-point values are rounded first, so that a model loaded in bfloat16 keeps its digest.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if as_bfloat16 and tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        total.update(f"{name} {tuple(tensor.shape)} ".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return total.hexdigest()


def local_folder(source: str | Path, patterns: list[str], **hub_arguments: Any) -> Path:
    """A folder as it is, or the wanted files of a Hub repository. Raises `FileError` where there is neither."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileError(f"There is no folder {source}. Give a folder that save_graft wrote, or a Hub repository user/name.")
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, **hub_arguments))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(f"There is no folder {source}, and the Hub repository of that name did not load: {reason}") from error
