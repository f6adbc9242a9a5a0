"""Putting a graft into a model and taking it out again, bit for bit.

A seat takes the place of the original at one path of the module tree; the original waits inside the graft. Installing
and removing are the same exchange in both directions, so what was put in can always be taken out.
"""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.hooks import group_offloading
from torch import nn
from torch.utils._pytree import tree_map_only

from ..errors import StateError
from ..inspection import argument_names, bind_arguments, context_of, family_of, require_model
from .attention_processor import is_grafted
from .checkpointing import forget_contexts, remember_contexts
from .graft import COMPUTE_DTYPES, AttentionSeat, Graft, get_graft, is_enabled

_GRAFT, _ENABLED, _SKIPPED = "_graft", "_graft_enabled", "_skip_layerwise_casting_patterns"
_BESIDE = "_graft_dtype_beside"  # kept on a part that waits: the dtype of what took its place, as it was then


def install(model: ModelMixin, graft: Graft) -> None:
    """Install a graft built for this very model.

    Raises:
        StateError: a graft is installed already, or this one was built beside another model object.
    """
    if (present := get_graft(model)) is not None:
        both = {e.site.address for e in present.plan.edits} & {e.site.address for e in graft.plan.edits}
        where = f" on the same sites ({', '.join(sorted(both))})" if both else ""
        raise StateError(
            f"This model is grafted already{where}. Put all rules into one plan, or call model.unset_graft() first."
        )
    require_built_beside(model, graft)
    _run(model, graft)


def uninstall(model: ModelMixin) -> Graft:
    """Take the graft out; the model is the original again. Raises `StateError` where there is none."""
    graft = require_graft(model)
    disable(model)
    del vars(model)[_GRAFT], vars(model)[_ENABLED]
    return graft


def enable(model: ModelMixin) -> None:
    """Run the grafted parts. Raises `StateError` where they cannot take their places."""
    graft = require_graft(model)
    if not is_enabled(model):
        _run(model, graft)


def _run(model: ModelMixin, graft: Graft) -> None:
    _exchange(model, graft, graft.seats, graft.adapters)
    model.register_forward_pre_hook(ContextReader(graft, model), with_kwargs=True)
    vars(model).update({_GRAFT: graft, _ENABLED: True})
    _tell_hooks(model)


def disable(model: ModelMixin) -> None:
    """Run the original parts; the graft stays at hand. Raises `StateError` where they cannot take their places."""
    graft = require_graft(model)
    if not is_enabled(model):
        return
    if graft.is_standalone:
        raise StateError(
            "This model was loaded whole: the parts its graft replaced are not in the file. Load the base model."
        )
    adapted = {path: layer.get_base_layer() for path, layer in graft.adapters.items()}
    _exchange(model, graft, graft.originals, adapted)
    _remove_reader(model)
    vars(model)[_ENABLED] = False
    _tell_hooks(model)


def require_graft(model: ModelMixin) -> Graft:
    """The installed graft. Raises `StateError` where there is none, `ModelError` for a pipeline."""
    graft = get_graft(model)
    if graft is None:
        require_model(model)
        raise StateError("This model has no graft. Install one with model.set_graft(...) or model.load_graft(...).")
    return graft


def require_built_beside(model: ModelMixin, graft: Graft) -> None:
    """Raise `StateError` unless given a graft whose parts stand for those of this very model, in their places.

    And `ModelError` for a pipeline.
    """
    require_model(model)
    if not isinstance(graft, Graft):
        raise StateError(f"A graft is what dg.build_graft(model, plan) makes; got a {type(graft).__name__}.")
    parts = dict(model.named_modules(remove_duplicate=False))
    for path, original in graft.originals.items():
        if parts.get(path) is not original:
            raise StateError(
                f"This graft was built beside another model object: its original of {path} is not in this one. "
                "Save it with save_graft and load it here, or build it with dg.build_graft(model, graft.plan)."
            )


def check_processors(graft: Graft) -> None:
    """Raise `StateError` where something else has thrown a graft's processor away."""
    for path, seat in graft.seats.items():
        processor = getattr(seat, "processor", None)
        if processor is not None and not isinstance(seat, AttentionSeat) and not is_grafted(processor):
            raise StateError(
                f"The graft at {path} was lost: its processor is now {type(processor).__name__}. Calls such as "
                "fuse_qkv_projections and set_attn_processor replace processors; make them first, then graft."
            )


class ContextReader:
    """Forward pre-hook of the root: reads the context of this forward for the parts of one graft."""

    def __init__(self, graft: Graft, model: ModelMixin):
        # Looked up here, since compiled code cannot.
        self.graft, self.family, self.names = graft, family_of(model), argument_names(type(model))

    def __call__(self, model: ModelMixin, args: tuple, kwargs: dict) -> None:
        check_processors(self.graft)
        inputs = bind_arguments(self.names, args, kwargs)
        self.graft.slot.current = context_of(model, self.family, inputs)
        if torch.compiler.is_compiling():
            return
        if "_hf_hook" in vars(model):
            _require_weights(self.graft)
        if torch.is_grad_enabled():
            remember_contexts(model, self.graft.slot)
        else:
            # Without the graph that made them, which no copy of the model could take along.
            self.graft.slot.arguments = tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)


def _require_weights(graft: Graft) -> None:
    """accelerate brings a layer's weights as it is called, and operators read those of theirs without: from empty
    memory.
    """
    for path, operator in graft.operators().items():
        layers = [layer for layer in operator.modules() if layer is not operator and "_hf_hook" in vars(layer)]
        if any(parameter.is_meta for layer in layers for parameter in layer.parameters()):
            raise StateError(
                f"{operator.name} at {path} is offloaded layer by layer, and may read weights of layers that it does not call. "
                "Call pipe.remove_all_hooks(), then pipe.enable_model_cpu_offload(), or offload blocks in groups."
            )


def _tell_hooks(model: ModelMixin) -> None:
    """Offloading by groups follows a change of modules; layerwise casting, enabled later, leaves grafts as they are."""
    patterns = type(model)._skip_layerwise_casting_patterns
    vars(model).pop(_SKIPPED, None)
    if is_enabled(model):
        vars(model)[_SKIPPED] = (*(patterns or ()), r"\.graft\.")
    if getattr(group_offloading, "_maybe_remove_and_reapply_group_offloading", None) is not None:
        group_offloading._maybe_remove_and_reapply_group_offloading(model)


def _remove_reader(model: ModelMixin) -> None:
    """By class, since a handle would be worthless in a deep copy of the model."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, ContextReader)]:
        del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    forget_contexts(model)


def _exchange(model: ModelMixin, graft: Graft, parts: dict[str, nn.Module], adapters: dict[str, nn.Module]) -> None:
    """Put `parts` and `adapters` at their paths and swap the trained tensors of the body with those waiting."""
    _refuse_offloaded(model)
    trained = _trained_parameters(model, graft)
    for path, part in sorted(
        {**parts, **adapters}.items(), key=lambda item: item[0].count(".")
    ):  # blocks before their parts
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        _follow(model, holder._modules[name], part)
        holder._modules[name] = part
    for name, parameter in trained.items():
        waiting, graft.body[name] = graft.body[name], parameter.data
        parameter.data = waiting.to(parameter.device, parameter.dtype)


def _refuse_offloaded(model: ModelMixin) -> None:
    for path, module in model.named_modules():
        if path and hasattr(module, "_hf_hook"):
            raise StateError(
                f"accelerate keeps the weights of {path} elsewhere, where parts that change places would lose them. Call "
                "pipe.remove_all_hooks() first, or remove_hook_from_submodules(model) of accelerate.hooks; offload again "
                "afterwards."
            )


def _trained_parameters(model: ModelMixin, graft: Graft) -> dict[str, nn.Parameter]:
    """The parameters of the body by the names they have without LoRA, all found before anything moves."""
    if not graft.body:
        return {}
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    if lost := sorted(graft.body.keys() - parameters.keys()):
        raise StateError(
            f"This graft trained {lost[0]}, which the model no longer has. Undo what replaced that module since, such as "
            "fusing or quantising it."
        )
    return {name: parameters[name] for name in graft.body}


def _follow(model: ModelMixin, leaving: nn.Module, coming: nn.Module) -> None:
    """Move a part that waited off the tree to where the model went meanwhile, without touching what it shares."""
    _wrap_alike(leaving, coming)
    if coming.training != leaving.training:  # else parts of it may have modes of their own
        coming.train(leaving.training)
    counterparts = dict(leaving.named_parameters())
    if (here := _anchor(model, leaving)) is None:
        return  # weights that are only stored, quantised or fp8, say nothing about where a part should go
    cast = vars(coming).pop(_BESIDE, None) != here.dtype  # else parameters of several dtypes keep theirs
    shared = {id(parameter) for parameter in counterparts.values()}
    for name, parameter in coming.named_parameters():
        like = counterparts.get(name, here)
        like = like if like.dtype in COMPUTE_DTYPES else here
        dtype = like.dtype if cast or like is not here else parameter.dtype
        if id(parameter) not in shared and (parameter.device, parameter.dtype) != (like.device, dtype):
            parameter.data = parameter.data.to(like.device, dtype)
    vars(leaving)[_BESIDE] = getattr(_anchor(model, coming), "dtype", None)


def _wrap_alike(leaving: nn.Module, coming: nn.Module) -> None:
    """Layers that both parts share stay alike where LoRA was put around them, or taken off, while one of them waited."""
    waiting = dict(coming.named_modules())
    for path, layer in leaving.named_modules():
        other = waiting.get(path, layer)
        if path and other is not layer and _base_layer(other) is _base_layer(layer):
            coming.set_submodule(path, layer)


def _base_layer(layer: nn.Module) -> nn.Module:
    """What LoRA was put around; the layer itself where none was."""
    return getattr(layer, "base_layer", layer)


def _anchor(model: ModelMixin, part: nn.Module) -> nn.Parameter | None:
    """The parameter that tells where a part is; of what stands for a removed block, and has none, the model's."""
    parameters = part.parameters() if any(True for _ in part.parameters()) else model.parameters()
    return next((parameter for parameter in parameters if parameter.dtype in COMPUTE_DTYPES), None)
