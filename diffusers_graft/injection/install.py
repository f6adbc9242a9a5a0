"""Putting a graft into a model and taking it out again, bit for bit.

A seat takes the place of the original at one path of the module tree; the original waits inside the graft. Installing
and removing are the same exchange in both directions, so what was put in can always be taken out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from diffusers import ModelMixin
from torch import nn
from torch.utils._pytree import tree_map_only

from ..errors import StateError
from ..inspection import argument_names, bind_arguments, context_of, evaluating, family_of, require_model
from .attention_processor import graft_processor, is_grafted
from .checkpointing import forget_contexts, remember_contexts
from .graft import Graft, get_graft, is_enabled
from .hooks import refuse_moving_hooked, require_weights, skip_layerwise_casting, without_group_offloading
from .modules import AttentionSeat
from .waiting_parts import TreeState, follow, refuse_newly_quantised

_GRAFT = "_graft"
_ENABLED = "_graft_enabled"


def install(model: ModelMixin, graft: Graft) -> None:
    """Install a graft built for this very model.

    Raises:
        StateError: a graft is installed already, or this one was built beside another model object.
    """
    present = get_graft(model)
    if present is not None:
        installed = {edit.site.address for edit in present.plan.edits}
        both = sorted(installed.intersection(edit.site.address for edit in graft.plan.edits))
        where = ""
        if both:
            where = f" on the same sites ({', '.join(both)})"
        raise StateError(
            f"This model is grafted already{where}. Put all rules into one plan, or call model.unset_graft() first."
        )
    require_built_beside(model, graft)
    _run(model, graft)


def uninstall(model: ModelMixin) -> Graft:
    """Take the graft out; the model is the original again. Raises `StateError` where there is none."""
    graft = require_graft(model)
    disable(model)
    del vars(model)[_GRAFT]
    del vars(model)[_ENABLED]
    return graft


def enable(model: ModelMixin) -> None:
    """Run the grafted parts, with their processors where others took their place.

    Raises `StateError` where they cannot take their places.
    """
    graft = require_graft(model)
    if is_enabled(model):
        _restore_processors(graft)
    else:
        _run(model, graft)


def _run(model: ModelMixin, graft: Graft) -> None:
    _exchange(model, graft, graft.seats, graft.adapters)
    _restore_processors(graft)
    model.register_forward_pre_hook(InstalledReader(graft, model), with_kwargs=True)
    vars(model).update({_GRAFT: graft, _ENABLED: True})
    skip_layerwise_casting(model, of_grafts=True)


def disable(model: ModelMixin) -> None:
    """Run the original parts; the graft waits. Raises `StateError` where they cannot take their places."""
    graft = require_graft(model)
    if not is_enabled(model):
        return
    if graft.is_standalone:
        raise StateError(
            "This model was loaded in full: the parts its graft replaced are not in the file. Load the base model."
        )
    # LoRA that was trained with the graft leaves with it.
    adapted = {}
    for path, layer in graft.adapters.items():
        adapted[path] = layer.get_base_layer()  # pyright: ignore[reportCallIssue]  # a layer of peft
    _exchange(model, graft, graft.originals, adapted)
    _remove_reader(model)
    vars(model)[_ENABLED] = False
    skip_layerwise_casting(model, of_grafts=False)


@contextlib.contextmanager
def original_running(model: ModelMixin) -> Iterator[None]:
    """Run the original parts inside. Raises `StateError` where they cannot take their places."""
    was_enabled = is_enabled(model)
    disable(model)
    try:
        yield
    finally:
        if was_enabled:
            enable(model)


@contextlib.contextmanager
def originals_running_at(model: ModelMixin, paths: Iterable[str]) -> Iterator[None]:
    """Run the original parts at some paths of an enabled graft inside, frozen and in evaluation mode."""
    graft = require_graft(model)
    originals = {path: graft.originals[path] for path in paths}
    seats = {path: graft.seats[path] for path in originals}
    _exchange(model, graft, originals, {}, with_body=False)
    try:
        with contextlib.ExitStack() as stack:
            for original in originals.values():
                stack.enter_context(evaluating(original))
                stack.enter_context(_frozen(original))
            yield
    finally:
        _exchange(model, graft, seats, {}, with_body=False)


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def require_graft(model: ModelMixin) -> Graft:
    """Return the installed graft. Raises `StateError` where there is none, `ModelError` for a pipeline."""
    graft = get_graft(model)
    if graft is None:
        require_model(model)
        raise StateError("This model has no graft. Install one with model.set_graft(...) or model.load_graft(...).")
    return graft


def require_built_beside(model: ModelMixin, graft: Graft) -> None:
    """Check that the originals of a graft are the parts of this very model, in their places.

    Raises `StateError` where they are not, `ModelError` for a pipeline.
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
    """Raise `StateError` where another verb replaced a graft's processor."""
    for path, seat in _mixer_seats(graft):
        if not is_grafted(seat.processor):
            raise StateError(
                f"The graft at {path} was lost: its processor is now {type(seat.processor).__name__}. Calls such as "
                "fuse_qkv_projections, set_attn_processor and enable_attention_slicing, and pipelines with PAG, "
                "replace processors. Call model.enable_graft() to put the graft's back."
            )


def _restore_processors(graft: Graft) -> None:
    for path, seat in _mixer_seats(graft):
        if not is_grafted(seat.processor):
            # A processor that is a module is a child, which an attribute cannot replace.
            seat._modules.pop("processor", None)
            seat.processor = graft_processor(graft.originals[path].processor)


def _mixer_seats(graft: Graft) -> list[tuple[str, nn.Module]]:
    """Return the seats that run an operator through a processor, by path."""
    return [
        (path, seat)
        for path, seat in graft.seats.items()
        if getattr(seat, "processor", None) is not None and not isinstance(seat, AttentionSeat)
    ]


class ContextReader:
    """Forward pre-hook of the root: reads the context of this forward for the parts of one graft."""

    def __init__(self, graft: Graft, model: ModelMixin):
        self.graft = graft
        # Read here, since compiled code cannot.
        self.family = family_of(model)
        self.names = argument_names(type(model))

    def __call__(self, model: ModelMixin, args: tuple, kwargs: dict) -> None:
        # Before the forward, since a lost processor would run as if there were no graft.
        check_processors(self.graft)
        inputs = bind_arguments(self.names, args, kwargs)
        self.graft.slot.current = context_of(model, self.family, inputs)
        if torch.compiler.is_compiling():
            return
        if "_hf_hook" in vars(model):
            for path, operator in self.graft.operators().items():
                require_weights(path, operator)
        if torch.is_grad_enabled():
            remember_contexts(model, self.graft.slot)
        else:
            # Without the graph that made them, which no copy of the model could take along.
            self.graft.slot.arguments = tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)


class InstalledReader(ContextReader):
    """The reader that comes and goes with the graft's parts; a stage that watches the originals has one of its own."""


def _remove_reader(model: ModelMixin) -> None:
    """Remove the hook by its class, since a handle would be worthless in a deep copy of the model."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, InstalledReader):
            del model._forward_pre_hooks[key]
            del model._forward_pre_hooks_with_kwargs[key]
    forget_contexts(model)


def _exchange(
    model: ModelMixin,
    graft: Graft,
    parts: dict[str, nn.Module],
    adapters: dict[str, nn.Module],
    *,
    with_body: bool = True,
) -> None:
    """Put `parts` and `adapters` at their paths, and swap the trained tensors of the base with those that wait."""
    # All that can refuse comes first, before anything moves.
    refuse_moving_hooked(model, parts)
    tree = TreeState.of(model)
    refuse_newly_quantised(model, tree, parts.values())
    trained = _trained_parameters(model, graft) if with_body else {}
    coming = {**parts, **adapters}
    with without_group_offloading(model):
        # Blocks before the parts inside them.
        for path in sorted(coming, key=lambda path: path.count(".")):
            parent, _, name = path.rpartition(".")
            holder = model.get_submodule(parent)
            leaving = holder._modules[name]
            assert leaving is not None
            follow(model, tree, leaving, coming[path])
            holder._modules[name] = coming[path]
        _exchange_trained(graft, trained)


def _exchange_trained(graft: Graft, trained: dict[str, nn.Parameter]) -> None:
    # Only the data: optimizers and shards hold the parameters themselves.
    for name, parameter in trained.items():
        waiting = graft.body[name]
        graft.body[name] = parameter.data
        parameter.data = waiting.to(parameter.device, parameter.dtype)


def _trained_parameters(model: ModelMixin, graft: Graft) -> dict[str, nn.Parameter]:
    """Return the parameters of the base that the graft trained, by the names they have without LoRA.

    Raises `StateError` where one is gone.
    """
    if not graft.body:
        return {}
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    lost = sorted(graft.body.keys() - parameters.keys())
    if lost:
        raise StateError(
            f"This graft trained {lost[0]}, which the model no longer has. Undo what replaced that module since, such "
            "as fusing or quantising it."
        )
    return {name: parameters[name] for name in graft.body}
