"""Trained weights as updates of the pretrained ones, each in the smallest form that keeps to a given error.

In the spirit of Knowledge Grafting of Large Language Models (SkillPack), arXiv 2505.18502: truncated singular values
or 8-bit integers with a scale for every output channel, whichever is smaller, a module at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import FileError, StateError
from .tensors import Tensors, require_finite

_SUFFIXES = {"svd": ("left", "right"), "int8": ("steps", "scale")}


def compress(tensors: Tensors, base: Tensors, error: float) -> tuple[Tensors, dict[str, dict[str, Any]]]:
    """Return tensors as they are stored, and for each compressed one its method, its measured error and its bytes.

    Args:
        tensors: those of a graft; one without a counterpart in `base` of the same shape stays as it is.
        error: largest relative error of an update in the Frobenius norm. Truncated singular values then keep at least
            1 - error ** 2 of its energy.

    Raises `StateError` for an error that is not between 0 and 1.
    """
    if isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error < 1:
        raise StateError(f"compress is the relative error allowed, between 0 and 1; got {error!r}. Try 0.01.")
    stored: Tensors = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        # New tensors, buffers of integers and resized ones are no updates of anything.
        if name not in base or base[name].shape != tensor.shape or not tensor.is_floating_point():
            stored[name] = tensor
            continue
        form, row = _smallest(tensor.detach().cpu(), base[name].detach().cpu(), error)
        if row["method"] == "full":
            stored[name] = tensor
            continue
        stored.update({f"{name}.{suffix}": part for suffix, part in form.items()})
        rows[name] = row
    return stored, rows


def _smallest(tensor: torch.Tensor, base: torch.Tensor, limit: float) -> tuple[Tensors, dict[str, Any]]:
    update = tensor.float() - base.float()
    before = _size({"": tensor})
    best = {"": tensor}
    row = {"method": "full", "error": 0.0, "bytes_before": before, "bytes_after": before}
    for method, form in (("svd", _singular(update, limit)), ("int8", _integers(update))):
        if form is None:
            continue
        size = _size(form)
        error = _relative(_update(method, form, update.shape), update)
        if error <= limit and size < row["bytes_after"]:
            best = form
            row = {"method": method, "error": error, "bytes_before": before, "bytes_after": size}
    return best, row


def _size(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _relative(approximate: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.norm().item()
    if not norm:
        return 0.0
    return (approximate - exact).norm().item() / norm


def _singular(update: torch.Tensor, limit: float) -> Tensors | None:
    if update.dim() < 2:
        return None
    left, values, right = torch.linalg.svd(update.flatten(1), full_matrices=False)
    energy = values.double().square()
    lost = (energy.sum() - energy.cumsum(0)).clamp_min(0).sqrt() / energy.sum().sqrt().clamp_min(1e-300)
    rank = 1
    if energy.sum():
        # A little less than the limit, since the product is rounded once more.
        rank = int((lost > 0.999 * limit).sum()) + 1
    return {"left": (left * values)[:, :rank].contiguous(), "right": right[:rank].contiguous()}


def _integers(update: torch.Tensor) -> Tensors:
    # A scale for every output channel; a vector counts as one channel.
    rows = update.reshape(_channels(update.shape), -1)
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return {"steps": (rows / scale).round().clamp(-127, 127).to(torch.int8), "scale": scale}


def _channels(shape: torch.Size) -> int:
    if len(shape) < 2:
        return 1
    return shape[0]


def _update(method: str, form: Tensors, shape: torch.Size) -> torch.Tensor:
    if method == "svd":
        return (form["left"] @ form["right"]).reshape(shape)
    return (form["steps"].float() * form["scale"]).reshape(shape)


def restore(tensors: Tensors, compressed: dict[str, Any], base: Tensors, where: Path) -> Tensors:
    """Return the tensors that `compress` stored, as they were but for the error.

    Raises `FileError` for forms that do not fit, or whose values are not finite once they are unpacked.
    """
    restored = dict(tensors)
    for name, row in compressed.items():
        try:
            method = row["method"]
            form = {suffix: restored.pop(f"{name}.{suffix}").cpu() for suffix in _SUFFIXES[method]}
            _require_shapes(method, form, base[name].shape)
            update = _update(method, form, base[name].shape)
            restored[name] = (base[name].detach().cpu().float() + update).to(base[name].dtype)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise FileError(f"The compressed update of {name} in {where} does not fit: {error!r}.") from error
    # Finite parts may have a product that is not.
    require_finite({name: restored[name] for name in compressed}, where)
    return restored


def _require_shapes(method: str, form: Tensors, shape: torch.Size) -> None:
    rows = _channels(shape)
    columns = shape.numel() // max(rows, 1)
    if method == "svd":
        rank = form["right"].shape[0]
        is_sound = form["left"].shape == (rows, rank) and form["right"].shape == (rank, columns)
    else:
        is_int8 = form["steps"].dtype == torch.int8
        is_sound = is_int8 and form["steps"].shape == (rows, columns) and form["scale"].shape == (rows, 1)
    if not is_sound:
        shapes = [tuple(part.shape) for part in form.values()]
        raise ValueError(f"its parts are {shapes}, for an update of {tuple(shape)}")
