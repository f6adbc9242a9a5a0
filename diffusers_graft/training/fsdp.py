"""Weights sharded over processes (FSDP2), as `accelerate launch --use_fsdp --fsdp_version 2` asks for.

The model that was given stays as it is, on the device it is on. A twin of it runs: at first the same weights in other
modules, then each process's shard of them, block by block. What was trained in the twin is copied back at the end, one
tensor at a time. Checkpoints hold full tensors, so a run that began on four processes may go on as one.
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
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from ..core.sites import Sites
from ..errors import TrainingError
from ..injection.graft import Graft, get_graft
from ..injection.install import disable, enable
from . import distributed as processes
from .sharded_tensors import CAN_WRITE, StoredTensor

# Adafactor computes norms of rows and columns of full tensors, Muon makes full matrices orthogonal.
UNSHARDABLE_OPTIMIZERS = ("Adafactor", "Muon")


def fsdp_plugin(optimizer: str = "AdamW") -> FullyShardedDataParallelPlugin | None:
    """Return accelerate's settings of FSDP; None where weights are not sharded: without it, and on one process.

    Raises `TrainingError` for settings that are not supported, and for an optimizer that needs full tensors.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or processes.process_state().num_processes == 1:
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise TrainingError("Weights are sharded by FSDP2, and FSDP1 was asked for: launch with --fsdp_version 2.")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise TrainingError("Weights stay on the devices here: launch without --fsdp_offload_params.")
    if optimizer in UNSHARDABLE_OPTIMIZERS:
        raise TrainingError(
            f"torch.optim.{optimizer} cannot step with weights that are sharded. Choose another, such as AdamW."
        )
    return plugin


def recomputes_blocks(wanted: bool) -> bool:
    """Return whether blocks are recomputed in the backward: as settings or `--fsdp_activation_checkpointing` say."""
    plugin = fsdp_plugin()
    return wanted or (plugin is not None and bool(plugin.activation_checkpointing))


def make_policy(precision: str | None) -> MixedPrecisionPolicy:
    """Return in which dtype weights are gathered and gradients are averaged.

    In bfloat16, half as many bytes go around; gradients are summed in float32, and so are the weights that the
    optimizer moves. What comes into a block keeps its dtype: autocast decides, layer by layer, as without sharding.
    """
    if precision != "bf16":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


@contextmanager
def shard(
    model: ModelMixin, sites: Sites, *, trained: bool = False, precision: str | None = None
) -> Iterator[ModelMixin]:
    """Give the model itself, or a twin with sharded weights; weights `trained` inside are the model's afterwards.

    They are so after a `TrainingError` too, which all processes meet together. After any other error the model has the
    weights it came with, and the checkpoints hold the others.

    Args:
        precision: of the forward, see `make_policy`.

    Raises `TrainingError` for weights that cannot be sharded together.
    """
    plugin = fsdp_plugin()
    if plugin is None:
        yield model
        return
    twin = _shard_blocks(_make_twin(model, trained), sites, plugin, make_policy(precision))
    try:
        yield twin
    except TrainingError:
        _copy_back(twin, model, trained)
        raise
    _copy_back(twin, model, trained)


def shard_original(model: ModelMixin, sites: Sites, precision: str | None) -> ModelMixin | None:
    """Return a sharded twin of the model without its graft.

    None where weights are not sharded: those can be exchanged in their place.
    """
    plugin = fsdp_plugin()
    if plugin is None:
        return None
    disable(model)
    try:
        return _shard_blocks(_make_twin(model, trained=False), sites, plugin, make_policy(precision))
    finally:
        enable(model)


@contextmanager
def seats_beside(graft: Graft, model: ModelMixin, teacher: ModelMixin) -> Iterator[None]:
    """Move new parts to the device of their teacher inside, where that is a twin of the model."""
    moved: list[nn.Module] = []
    if teacher is not model:
        moved = list(graft.seats.values())
    try:
        for seat in moved:
            seat.to(teacher.device)
        yield
    finally:
        for seat in moved:
            seat.to(model.device)


def find_blocks(model: ModelMixin, sites: Sites) -> list[str]:
    """Return the paths of the outermost blocks that sites lie in; none where they lie in no list of blocks."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for number in range(len(module)):
            block = f"{path}.{number}."
            if any(f"{site.path}.".startswith(block) for site in sites):
                found.append(block)
    outermost = [path for path in found if not any(path != other and path.startswith(other) for other in found)]
    return [path.removesuffix(".") for path in outermost]


def _make_twin(model: ModelMixin, trained: bool) -> ModelMixin:
    """Copy the modules over the same weights, frozen unless they are to be trained."""
    graft = get_graft(model)
    modules: list[nn.Module] = [model]
    known: dict[int, Any] = {}
    if graft is not None:
        # The twin refers to the graft, whose tensors are not copied either.
        modules += [*graft.seats.values(), *graft.originals.values()]
        known = {id(tensor): tensor for tensor in graft.body.values()}
    for module in modules:
        for parameter in module.parameters():
            is_trained = trained and parameter.requires_grad
            twin = nn.Parameter(parameter.detach().contiguous(), requires_grad=is_trained)
            known.setdefault(id(parameter), twin)
    return copy.deepcopy(model, known)


def _shard_blocks(
    twin: ModelMixin, sites: Sites, plugin: FullyShardedDataParallelPlugin, policy: MixedPrecisionPolicy
) -> ModelMixin:
    """Shard each block on its own, and the rest together."""
    dtypes = {str(parameter.dtype) for parameter in twin.parameters() if parameter.requires_grad}
    if len(dtypes) > 1:
        raise TrainingError(
            "Weights that are trained while sharded are of one dtype, and these are of "
            f"{' and '.join(sorted(dtypes))}: "
            'call model.to(torch.float32), with precision="bf16" for speed.'
        )
    # Blocks are gathered one at a time as the forward reaches them.
    state = processes.process_state()
    assert state.device is not None
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    blocks = {id(twin.get_submodule(path)) for path in find_blocks(twin, sites)}
    # From the inside out: what is sharded already is left alone by the module around it.
    for module in reversed(list(twin.modules())):
        # DiT calls the embedding of its first block from outside that block.
        embeds_labels = any(isinstance(child, LabelEmbedding) for child in module.children())
        if embeds_labels or id(module) in blocks or module is twin:
            reshard = bool(plugin.reshard_after_forward)
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    return twin


@torch.no_grad()
def _copy_back(twin: ModelMixin, model: ModelMixin, trained: bool) -> None:
    if not trained:
        return
    for home, parameter in zip(model.parameters(), twin.parameters(), strict=True):
        if parameter.requires_grad:
            home.copy_(full_tensor(parameter))
    for home, buffer in zip(model.buffers(), twin.buffers(), strict=True):
        home.copy_(buffer)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with all its shards; every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def writes_shards() -> bool:
    """Return whether every process writes its own shards to a checkpoint, as FSDP2 does unless it is told otherwise.

    Where torch is too old to do so without pickling, and with `--fsdp_state_dict_type FULL_STATE_DICT`, the first
    process gathers and writes them.
    """
    plugin = fsdp_plugin()
    return CAN_WRITE and plugin is not None and "SHARDED" in str(plugin.state_dict_type)


def gather_state(state: Any) -> Any:
    """Return a nested state with full tensors, in the host's memory of the process that writes; others get nothing.

    Where every process writes its own shards, the state is returned as it is.
    """
    if writes_shards():
        return state

    def gather(tensor: DTensor) -> torch.Tensor:
        full = tensor.full_tensor()
        return full.cpu() if processes.is_main_process() else full.new_empty(0)

    return tree_map_only(DTensor, gather, state)


def shard_like(value: torch.Tensor | StoredTensor, parameter: torch.Tensor) -> torch.Tensor:
    """Shard a full tensor as a parameter is; one of another shape, such as a count of steps, is returned as it is.

    Of a tensor that is stored in shards, those of this process are read.
    """
    if isinstance(value, StoredTensor):
        return value.read_like(parameter)
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def shard_optimizer_state(state: Mapping[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Shard the full state of an optimizer, each tensor as its parameter is."""
    sharded: dict[Any, dict[str, Any]] = {}
    for number, values in state["state"].items():
        sharded[number] = {}
        for name, value in values.items():
            if isinstance(value, torch.Tensor | StoredTensor):
                value = shard_like(value, parameters[number])
            sharded[number][name] = value
    return {**state, "state": sharded}
