"""Weights spread over processes (FSDP2), as `accelerate launch --use_fsdp --fsdp_version 2` asks for.

The model that was given stays as it is, on the device it is on. A twin of it runs: at first the same weights in other
modules, then each process's part of them, block by block. What was trained in the twin is brought back at the end, one
tensor at a time. Checkpoints hold whole tensors, so a run that was begun on four processes may go on as one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import parse_flag_from_env
from diffusers import ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from ..core.sites import Sites
from ..errors import TrainingError
from ..injection.graft import Graft, get_graft
from ..injection.install import disable, enable
from . import distributed as processes

UNABLE = ("Adafactor",)  # the norms of rows and columns that it takes in place are of whole tensors


def fsdp_plugin(optimizer: str = "AdamW") -> FullyShardedDataParallelPlugin | None:
    """What accelerate was told about FSDP; None where weights stay whole: without it, and on one process.

    Raises `TrainingError` for what is not done here, an optimiser that needs whole tensors included.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or processes.process_state().num_processes == 1:
        return None
    told = FullyShardedDataParallelPlugin()
    if told.fsdp_version != 2:
        raise TrainingError("Weights are spread by FSDP2, and FSDP1 was asked for: launch with --fsdp_version 2.")
    if isinstance(told.cpu_offload, CPUOffloadPolicy):
        raise TrainingError("Weights stay on the devices here: launch without --fsdp_offload_params.")
    if told.activation_checkpointing:
        raise TrainingError(
            "Blocks are recomputed where the configuration says so: launch without --fsdp_activation_checkpointing, and set "
            "FinetuneConfig.gradient_checkpointing=True."
        )
    if optimizer in UNABLE:
        raise TrainingError(
            f"torch.optim.{optimizer} cannot step with weights that are spread. Choose another, such as AdamW."
        )
    return told


@contextmanager
def shard(model: ModelMixin, sites: Sites, *, trained: bool = False) -> Iterator[ModelMixin]:
    """The model itself, or a twin whose weights are spread; where they are `trained` inside, they are the model's
    afterwards.

    They are so after a `TrainingError` too, which all processes meet together. After anything else the model has the
    weights
    it came with: only the checkpoints know better.

    Raises `TrainingError` for weights that cannot be spread together.
    """
    if (told := fsdp_plugin()) is None:
        yield model
        return
    twin = _sharded(_twin(model, trained), sites, told)
    try:
        yield twin
    except TrainingError:
        _bring_back(twin, model, trained)
        raise
    _bring_back(twin, model, trained)


def shard_original(model: ModelMixin, sites: Sites) -> ModelMixin | None:
    """A spread twin of what a grafted model was before; None where weights are whole, which can be changed in their
    place.
    """
    if (told := fsdp_plugin()) is None:
        return None
    disable(model)
    try:
        return _sharded(_twin(model, False), sites, told)
    finally:
        enable(model)


@contextmanager
def seats_beside(graft: Graft, model: ModelMixin, teacher: ModelMixin) -> Iterator[None]:
    """New parts on the device of their teacher, where that is a twin of the model and may be elsewhere."""
    moved = list(graft.seats.values()) if teacher is not model else []
    try:
        for seat in moved:
            seat.to(teacher.device)
        yield
    finally:
        for seat in moved:
            seat.to(model.device)


def find_blocks(model: ModelMixin, sites: Sites) -> list[str]:
    """Paths of the outermost blocks that sites lie in; none where they lie in no list of blocks."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [
        f"{path}.{number}"
        for path in lists
        for number in range(len(model.get_submodule(path)))
        if any(f"{site.path}.".startswith(f"{path}.{number}.") for site in sites)
    ]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def _twin(model: ModelMixin, trained: bool) -> ModelMixin:
    """Other modules over the same weights, frozen unless they are to be trained."""
    graft = get_graft(model)
    parts = [model, *(graft.seats.values() if graft else ()), *(graft.originals.values() if graft else ())]
    known: dict[int, Any] = {id(tensor): tensor for tensor in (graft.body.values() if graft else ())}
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        learns = trained and parameter.requires_grad
        known.setdefault(id(parameter), nn.Parameter(parameter.detach().contiguous(), requires_grad=learns))
    return copy.deepcopy(model, known)


def _sharded(twin: ModelMixin, sites: Sites, told: FullyShardedDataParallelPlugin) -> ModelMixin:
    """Each block for itself, and the rest together."""
    if len(dtypes := {str(parameter.dtype) for parameter in twin.parameters() if parameter.requires_grad}) > 1:
        raise TrainingError(
            f"Weights that are trained while spread are of one dtype, and these are of {' and '.join(sorted(dtypes))}: "
            'call model.to(torch.float32), with precision="bf16" for speed.'
        )
    mesh = init_device_mesh(processes.process_state().device.type, (processes.process_state().num_processes,))
    blocks = {id(twin.get_submodule(path)) for path in find_blocks(twin, sites)}
    for module in reversed(list(twin.modules())):
        # DiT calls the embedding of its first block from outside that block.
        embeds_labels = any(isinstance(child, LabelEmbedding) for child in module.children())
        if embeds_labels or id(module) in blocks or module is twin:
            fully_shard(module, mesh=mesh, reshard_after_forward=told.reshard_after_forward)
    return twin


@torch.no_grad()
def _bring_back(twin: ModelMixin, model: ModelMixin, trained: bool) -> None:
    if not trained:
        return
    for home, own in zip(model.parameters(), twin.parameters(), strict=True):
        if own.requires_grad:
            home.copy_(full_tensor(own))
    for home, buffer in zip(model.buffers(), twin.buffers(), strict=True):
        home.copy_(buffer)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(state: Any) -> Any:
    """A nested state with whole tensors, in the host's memory of the process that writes; the others get nothing."""

    def together(tensor: DTensor) -> torch.Tensor:
        all_of_it = tensor.full_tensor()
        return all_of_it.cpu() if processes.is_main_process() else all_of_it.new_empty(0)

    return tree_map_only(DTensor, together, state)


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor spread as a parameter is; one of another shape, such as a count of steps, as it is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def shard_optimizer_state(state: Mapping[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The whole state of an optimiser, each tensor spread as its parameter is."""
    spread_out = {
        number: {
            name: shard_like(value, parameters[number]) if isinstance(value, torch.Tensor) else value
            for name, value in own.items()
        }
        for number, own in state["state"].items()
    }
    return {**state, "state": spread_out}
