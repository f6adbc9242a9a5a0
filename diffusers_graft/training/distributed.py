"""Several processes as one: every process reads the same batches and takes its share of each.

Noise is drawn for the whole batch before it is shared out, so a run does not depend on how many processes there are,
and one that was begun on four may be resumed on one.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, parse_flag_from_env, reduce
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import TrainingError


def process_state() -> PartialState:
    """The processes there are, as `accelerate launch` set them up.

    Raises `TrainingError` for DeepSpeed, which brings a training loop of its own.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise TrainingError(
            "DeepSpeed trains in its own loop. To spread weights, launch with --use_fsdp --fsdp_version 2."
        )
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def describe_hardware(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{device.type.upper()} ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
    count = process_state().num_processes
    return f"{count} x {name}" if count > 1 else name


def local_share(value: Any, count: int) -> Any:
    """This process's part of everything that has `count` samples along its first dimension.

    Raises `TrainingError` for a batch that cannot be shared evenly.
    """
    total = process_state().num_processes
    if total == 1:
        return value
    if count % total:
        raise TrainingError(f"A batch of {count} samples cannot be shared evenly by {total} processes.")
    if isinstance(value, Mapping):
        return {name: local_share(item, count) for name, item in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
        return value.chunk(total)[process_state().process_index]
    return value


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean over processes."""
    return values if process_state().num_processes == 1 else reduce(values, "mean")


def min_over_processes(value: int) -> int:
    """The smallest over processes."""
    if process_state().num_processes == 1:
        return value
    return int(gather(torch.tensor([value], device=process_state().device)).min())


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their mean over processes; what got none on any process keeps none.

    Those of spread weights are that already.
    """
    if process_state().num_processes == 1 or any(isinstance(parameter, DTensor) for parameter in parameters):
        return
    flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=flat[0].device, dtype=flat[0].dtype)
    *averaged, there = mean_over_processes(torch.cat([*flat, there])).split([*(len(f) for f in flat), len(there)])
    for parameter, gradient, seen in zip(parameters, averaged, there.tolist(), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if seen else None


def is_main_process() -> bool:
    """Whether this process writes files and shows bars."""
    return process_state().is_main_process


def wait_for_all() -> None:
    """Until every process is here."""
    process_state().wait_for_everyone()
