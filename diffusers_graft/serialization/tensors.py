"""Files: written whole, and read as what they must be or refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import FileError

DISK_ERRORS = (OSError, SafetensorError)
_LARGEST_JSON = 32 * 2**20
_DEEPEST_JSON = 64
_ROW = 1024  # words of 8 bytes that a checksum adds up at once
_SAMPLES = 2048  # values of a tensor that a fingerprint looks at


def write_text(path: Path, text: str) -> None:
    """A text file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str]) -> None:
    """A safetensors file that is on the disk when this returns."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in apart(tensors).items()}
    save_file(ready, path, metadata={"format": "pt", **header})
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in memory of their own each, as safetensors wants them; tied ones are stored once for every name."""
    seen, separate = set(), {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return separate


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
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise FileError(f"{path} is damaged ({error}). Download or save it again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises `FileError` for a file that is missing, too large, or no JSON object."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise FileError(f"{path} has {path.stat().st_size:,} bytes; a description has at most {_LARGEST_JSON:,}.")
        return parse_json(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise FileError(f"There is no {path.name} in {path.parent}.") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is damaged: it is not text ({error}).") from error


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object from text. Raises `FileError` for text that is anything else, or nested deeper than ours ever is."""
    if len(text) > _LARGEST_JSON:
        raise FileError(f"{where} holds {len(text):,} characters; a description has at most {_LARGEST_JSON:,}.")
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
        deep = _depth(data) > _DEEPEST_JSON
    except RecursionError:
        deep = True
    except ValueError as error:
        raise FileError(f"{where} is damaged: it is not JSON ({error}).") from error
    if deep:
        raise FileError(f"{where} is nested deeper than {_DEEPEST_JSON} levels; nothing of ours is.")
    if not isinstance(data, dict):
        raise FileError(f"{where} is damaged: it holds no JSON object.")
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _depth(data: Any) -> int:
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return 1 + max(map(_depth, children), default=0)


def require_finite(tensors: Mapping[str, torch.Tensor], where: Path | str) -> None:
    """Raise `FileError` where a value is not finite."""
    for name, tensor in tensors.items():
        if (
            tensor.is_floating_point()
            and not tensor.sum(dtype=torch.float32).isfinite()
            and not tensor.isfinite().all()
        ):
            raise FileError(
                f"{name} in {where} holds values that are not finite; this cannot be used. "
                "Take an earlier save or checkpoint."
            )


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Names, dtypes, shapes and values in one number that no damage leaves as it was, at the speed of memory.

    Sums of rows of words go into a SHA-256; the words themselves would take longer to hash than to read.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        data = tensor.reshape(-1).view(torch.uint8)
        whole = data.numel() // (8 * _ROW) * 8 * _ROW
        if whole:
            rows = data[:whole].clone() if data.storage_offset() % 8 else data[:whole]
            total.update(rows.view(torch.int64).view(-1, _ROW).sum(1).numpy())
        total.update(data[whole:].numpy())
    return total.hexdigest()


def fingerprint(tensors: Mapping[str, torch.Tensor], *, through: torch.dtype = torch.bfloat16) -> str:
    """Who a model is: names, shapes, and values spread evenly over every tensor, rounded to bfloat16.

    A model loaded in bfloat16 keeps its fingerprint; one loaded in float16 keeps that which is rounded `through`
    float16 first, since rounding twice is not rounding once. Whatever touches a tensor as a whole is seen (training,
    merging, another checkpoint), and every value of a tensor that has at most `_SAMPLES`; of larger ones a change of
    single values between the samples is not, and shows in the proof alone. Rounding all values of a base costs more
    than loading a graft of 1 % of it.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1)
        total.update(f"{name} {tuple(tensors[name].shape)} ".encode())
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _SAMPLES), dtype=torch.float64).long()
        values = flat[places.to(flat.device)]
        values = values.to(through).to(torch.bfloat16) if values.is_floating_point() else values
        total.update(values.contiguous().view(torch.uint8).cpu().numpy())
    return total.hexdigest()


def digest(tensors: Mapping[str, torch.Tensor], *, as_bfloat16: bool = False) -> str:
    """SHA-256 over names, shapes and all values, in the order of names; what format 1 stored.

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
