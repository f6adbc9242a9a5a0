"""Sums over tensors: the checksum of a file, the fingerprint of a model, and the check that values are finite."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import FileError

Tensors = dict[str, torch.Tensor]

_WORD = 8
_ROW = 1024  # words that a checksum adds up at once
_SAMPLES = 2048  # values of a tensor that a fingerprint reads


def require_finite(tensors: Mapping[str, torch.Tensor], where: Path | str) -> None:
    """Raise `FileError` where a value is not finite."""
    for name, tensor in plain_tensors(tensors).items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        # The sum is cheap and not finite where a value is not; but it may overflow where all values are.
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            raise FileError(
                f"{name} in {where} holds values that are not finite; this cannot be used. "
                "Take an earlier save or checkpoint."
            )


def plain_tensors(tensors: Mapping[str, Any]) -> Tensors:
    """Return tensors by name, those of torchao's quantised ones in their place: they cannot be viewed or summed."""
    plain: Tensors = {}
    for name, tensor in tensors.items():
        if is_quantised(tensor):
            inner, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]  # of subclasses alone
            plain.update(plain_tensors({f"{name}.{part}": getattr(tensor, part) for part in inner}))
        else:
            plain[name] = tensor
    return plain


def is_quantised(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is made of others, as torchao's are."""
    is_sharded = hasattr(tensor, "full_tensor")
    return is_traceable_wrapper_subclass(tensor) and not is_sharded


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a number that changes with every name, dtype, shape and value, computed at the speed of memory.

    Sums of rows of words go into a SHA-256; hashing the words themselves would take longer than reading them.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        # Dtype and shape too: the same bytes may be read as other numbers.
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(errors="surrogatepass"))
        data = tensor.reshape(-1).view(torch.uint8)
        in_rows = data.numel() // (_WORD * _ROW) * _WORD * _ROW
        if in_rows:
            rows = data[:in_rows]
            # Words can only be viewed where memory is aligned to them.
            if data.storage_offset() % _WORD:
                rows = rows.clone()
            total.update(rows.view(torch.int64).view(-1, _ROW).sum(1).numpy().data)
        total.update(data[in_rows:].numpy().data)
    return total.hexdigest()


def fingerprint(tensors: Mapping[str, torch.Tensor], *, through: torch.dtype = torch.bfloat16) -> str:
    """Return a number that identifies a model: names, shapes, and values spread evenly over every tensor.

    Values are rounded to bfloat16, so a model loaded in bfloat16 keeps its fingerprint; one loaded in float16 keeps
    the fingerprint that is rounded `through` float16 first, since rounding twice is not rounding once. A change of a
    tensor as a whole is seen (training, merging, another checkpoint), and a change of any value of a tensor that has
    at most `_SAMPLES`. In a larger one, a change of single values between the samples is not seen; the proof shows
    it. Rounding all values of a base would take longer than loading a graft of 1 % of it.
    """
    total = hashlib.sha256()
    plain = plain_tensors(tensors)
    for name in sorted(plain):
        flat = plain[name].detach().reshape(-1)
        total.update(f"{name} {tuple(plain[name].shape)} ".encode())
        # In float64, which holds every index of a tensor exactly.
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _SAMPLES), dtype=torch.float64).long()
        values = flat[places.to(flat.device)]
        if values.is_floating_point():
            values = values.to(through).to(torch.bfloat16)
        total.update(values.contiguous().view(torch.uint8).cpu().numpy().data)
    return total.hexdigest()
