"""Calls of a group of sites kept in memory, so that one pass of the teacher serves several steps of the new parts."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch.utils._pytree import tree_iter, tree_map

from ...errors import TrainingError
from .capture import Call


def kept(call: Call, where: torch.device) -> Call:
    """A call on a device, its tensors copied, so that nothing of the forward stays alive or changes it."""
    copied = tree_map(
        lambda item: item.to(where, copy=True) if isinstance(item, torch.Tensor) else item,
        (call.args, call.kwargs, call.output, call.gate),
    )
    return Call(*copied, call.context)


def size_of(call: Call) -> int:
    """Bytes of a call's tensors."""
    tensors = tree_iter((call.args, call.kwargs, call.output, call.gate))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


def free_memory(device: torch.device) -> int:
    """Half of the bytes that are free on a device, or on this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError) as error:
        raise TrainingError(
            "This system does not tell how much memory is free: set DistillConfig.memory, in bytes."
        ) from error


def groups(sizes: dict[str, int], limit: int, batches: int) -> list[list[str]]:
    """Neighbouring sites put together as far as `batches` calls of each fit into `limit` bytes.

    Raises `TrainingError` where not even two calls of one site do.
    """
    together: list[list[str]] = []
    used = limit
    for path, size in sizes.items():
        if 2 * size > limit:
            raise TrainingError(
                f"Two batches of {path} take {2 * size:,} bytes, and reuse may keep {limit:,}. Raise DistillConfig.memory, "
                "make batches smaller, or choose reuse=1, which keeps nothing."
            )
        if used + batches * size > limit:
            together.append([])
            used = 0
        together[-1].append(path)
        used += batches * size
    return together


def capacity(sizes: Iterable[int], limit: int, batches: int) -> int:
    """How many batches of a group are kept."""
    return max(2, min(batches, limit // max(1, sum(sizes))))
