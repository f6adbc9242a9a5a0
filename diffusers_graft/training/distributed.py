"""Several processes as one: each computes its share of every batch.

Noise is drawn for the whole batch before it is divided, so a run does not depend on the number of processes, and one
that began on four may be resumed on one.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object, parse_flag_from_env, reduce
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from ..errors import TrainingError

# Set by `computing_apart`.
_is_apart = False


def process_state() -> PartialState:
    """Return the processes there are, as `accelerate launch` set them up.

    Raises `TrainingError` for DeepSpeed, which brings a training loop of its own.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise TrainingError(
            "DeepSpeed trains in its own loop. To shard weights, launch with --use_fsdp --fsdp_version 2."
        )
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def describe_hardware(device: torch.device) -> str:
    """Return in words what computes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        words = "1 thread" if threads == 1 else f"{threads} threads"
        name = f"{device.type.upper()} ({platform.machine()}, {words})"
    count = process_state().num_processes
    if count == 1:
        return name
    return f"{count} x {name}"


def local_share(value: Any, count: int) -> Any:
    """Return this process's part of everything that has `count` samples along its first dimension.

    Raises `TrainingError` for a batch that cannot be divided evenly.
    """
    state = process_state()
    if state.num_processes == 1:
        return value
    if count % state.num_processes:
        raise TrainingError(
            f"A batch of {count} samples cannot be divided evenly among {state.num_processes} processes."
        )
    if isinstance(value, Mapping):
        return {name: local_share(item, count) for name, item in value.items()}
    # Tensors of other lengths, such as rotary embeddings, are for all samples.
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
        return value.chunk(state.num_processes)[state.process_index]
    if isinstance(value, list) and len(value) == count:
        size = count // state.num_processes
        return value[state.process_index * size :][:size]
    if isinstance(value, list):
        # One tensor for each layer of a text encoder.
        return [local_share(item, count) for item in value]
    return value


@contextmanager
def computing_apart() -> Iterator[None]:
    """Let means be those of this process inside: each computes something else, of whole batches."""
    global _is_apart
    before = _is_apart
    _is_apart = True
    try:
        yield
    finally:
        _is_apart = before


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over processes."""
    if process_state().num_processes == 1 or _is_apart:
        return values
    return cast(torch.Tensor, reduce(values, "mean"))


def min_over_processes(value: int) -> int:
    """Return the smallest value of all processes."""
    state = process_state()
    if state.num_processes == 1:
        return value
    values = cast(torch.Tensor, gather(torch.tensor([value], device=state.device)))
    return int(values.min())


def gather_values(value: Any) -> list[Any]:
    """Return the value of every process, in their order; tensors on the host alone."""
    if process_state().num_processes == 1:
        return [value]
    return gather_object([value])


def gather_at_main(value: Any) -> list[Any]:
    """Return the value of every process, in their order, on the first one; tensors on the host. Others get nothing."""
    state = process_state()
    if state.num_processes == 1:
        return [value]
    on_host = tree_map_only(torch.Tensor, torch.Tensor.cpu, value)
    gathered: list[Any] | None = [None] * state.num_processes if state.is_main_process else None
    torch.distributed.gather_object(on_host, gathered)
    return gathered or []


def send_from(process: int, tensors: Iterable[torch.Tensor]) -> None:
    """Give the other processes the values that tensors have on one of them."""
    for tensor in tensors:
        torch.distributed.broadcast(tensor.data, src=process)


def join_shares(share: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole batch of which every process has read every n-th sample; others of its values are for all.

    Raises `TrainingError` for samples of different sizes.
    """
    shares = gather_values(tree_map_only(torch.Tensor, torch.Tensor.cpu, dict(share)))
    try:
        return {name: _interleave([one[name] for one in shares]) for name in share}
    except RuntimeError as error:
        raise TrainingError(f"Samples of several processes do not make one batch: {error}.") from error


def _interleave(values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {name: _interleave([value[name] for value in values]) for name in values[0]}
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    return torch.stack(values, dim=1).flatten(0, 1)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their mean over processes; a parameter without any on all processes still has none.

    Gradients of sharded weights are such means already.
    """
    if process_state().num_processes == 1 or _is_apart:
        return
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return
    gradients = []
    # A part that one process did not call has no gradient there.
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append(gradient.flatten())
    flags = [float(parameter.grad is not None) for parameter in parameters]
    has_gradient = torch.tensor(flags, device=gradients[0].device, dtype=gradients[0].dtype)
    # One message for all of them.
    together = mean_over_processes(torch.cat([*gradients, has_gradient]))
    *averaged, has_gradient = together.split([*map(len, gradients), len(has_gradient)])
    for parameter, gradient, seen in zip(parameters, averaged, has_gradient.tolist(), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if seen else None


def is_main_process() -> bool:
    """Return whether this process writes files and shows bars."""
    return process_state().is_main_process


def wait_for_all() -> None:
    """Wait until every process is here."""
    process_state().wait_for_everyone()
