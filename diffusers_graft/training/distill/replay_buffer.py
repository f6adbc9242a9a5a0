"""Replay buffer: captured calls in memory, so that one forward of the teacher serves several steps."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch.utils._pytree import tree_iter, tree_map_only

from ...errors import TrainingError
from .capture import CapturedCall


def copy_call(call: CapturedCall, device: torch.device) -> CapturedCall:
    """Copy a call to a device, so that nothing of its forward stays alive or changes it."""
    # Blocks may write into their inputs after the hooks ran.
    args, kwargs, output, gate = tree_map_only(
        torch.Tensor,
        lambda tensor: tensor.to(device, copy=True),
        (call.args, call.kwargs, call.output, call.gate),
    )
    return CapturedCall(args, kwargs, output, gate, call.context)


def size_of_call(call: CapturedCall) -> int:
    """Return the bytes of a call's tensors."""
    tensors = tree_iter((call.args, call.kwargs, call.output, call.gate))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


def usable_memory(device: torch.device) -> int:
    """Return half of the bytes that are free on a device, or on this machine."""
    # The other half is for the forwards, whose need is not known.
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError) as error:
        raise TrainingError(
            "This system does not say how much memory is free: set DistillConfig.memory, in bytes."
        ) from error


def group_sites(sizes: dict[str, int], limit: int, batches: int) -> list[list[str]]:
    """Group neighbouring sites, each group as large as `batches` calls of its sites fit into `limit` bytes.

    Raises `TrainingError` where not even two calls of one site do.
    """
    groups: list[list[str]] = []
    used = limit
    for path, size in sizes.items():
        # With one batch at a time, every step would use the same batch again.
        if 2 * size > limit:
            raise TrainingError(
                f"Two batches of {path} take {2 * size:,} bytes, and reuse may keep {limit:,}. Raise "
                "DistillConfig.memory, make batches smaller, or choose reuse=1, which stores nothing."
            )
        if used + batches * size > limit:
            groups.append([])
            used = 0
        groups[-1].append(path)
        used += batches * size
    return groups


def batches_that_fit(sizes: Iterable[int], limit: int, batches: int) -> int:
    """Return how many batches of a group fit into `limit` bytes: from 2 to `batches`."""
    return max(2, min(batches, limit // max(1, sum(sizes))))
