"""LoRA methods of diffusers, extended to the parts that a graft has exchanged and that wait outside the module tree.

Loading, weighting, disabling, fusing or unloading LoRA walks the modules of a model. A part that waits would miss it
and return with its old LoRA. So on a grafted model a method runs twice: on the model, and on a view of it that holds
only the parts that wait, at their paths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from torch import nn

from ..core.post_import import when_imported
from .graft import get_graft, is_enabled
from .hooks import without_group_offloading
from .module_copy import copy_shallow
from .waiting_parts import base_layer

if TYPE_CHECKING:
    from diffusers.loaders.lora_base import LoraBaseMixin

# Verbs that change the LoRA layers that are there.
_CHANGING = (
    "set_adapter",
    "set_adapters",
    "enable_adapters",
    "disable_adapters",
    "enable_lora",
    "disable_lora",
    "delete_adapters",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora",
)
# Verbs that add layers; peft raises a ValueError where no layer of the model is a target of theirs.
_ADDING = ("load_lora_adapter", "add_adapter")
_NO_TARGET = "arget modules"  # of its messages, which begin with "Target modules" or "No target modules"


def attach_lora_verbs() -> None:
    """Make the verbs reach parts that wait, once diffusers imports them. Called once, by `import diffusers_graft`."""
    when_imported("diffusers.loaders.peft", _attach_to_models)
    when_imported("diffusers.loaders.lora_base", _attach_to_pipelines)


def _attach_to_models() -> None:
    from diffusers.loaders.peft import PeftAdapterMixin

    for name in (*_CHANGING, *_ADDING):
        setattr(PeftAdapterMixin, name, _reach_waiting(getattr(PeftAdapterMixin, name)))


def _attach_to_pipelines() -> None:
    from diffusers.loaders.lora_base import LoraBaseMixin

    LoraBaseMixin.unfuse_lora = _unfuse_waiting(LoraBaseMixin.unfuse_lora)


def _reach_waiting(verb: Callable[..., Any]) -> Callable[..., Any]:
    adds = verb.__name__ in _ADDING

    @functools.wraps(verb)
    def reach(self: ModelMixin, *args: Any, **kwargs: Any) -> Any:
        waiting = _waiting_parts(self)
        if not waiting:
            return verb(self, *args, **kwargs)
        view = _view_of(self, waiting)
        result = None
        missed = None
        try:
            result = verb(self, *args, **kwargs)
        except ValueError as error:
            if not adds or _NO_TARGET not in str(error):
                raise
            # Perhaps all layers that this LoRA is for are among those that wait.
            missed = error
        reached = _reach_view(verb, self, view, tuple(f"{path}." for path in waiting), args, kwargs)
        if missed is not None and not reached:
            raise missed
        return result

    return reach


def _reach_view(
    verb: Callable[..., Any], model: ModelMixin, view: ModelMixin, paths: tuple[str, ...], args: tuple, kwargs: dict
) -> bool:
    """Run a verb on the parts that wait; returns whether it found anything there."""
    if verb.__name__ not in _ADDING:
        if not any(map(_is_adapted, view.modules())):
            return False
    elif args and isinstance(args[0], dict):
        # A state dict names its layers; others would be reported as unexpected.
        prefix = kwargs.get("prefix", "transformer")
        tensors = {key: value for key, value in args[0].items() if key.removeprefix(f"{prefix}.").startswith(paths)}
        if not tensors:
            return False
        args = (tensors, *args[1:])
    # Hooks hold tensors of the tree, and verbs would register them anew for the view.
    kwargs.pop("_pipeline", None)
    try:
        # The generator is put back, since what the model draws next must not depend on parts that wait.
        with without_group_offloading(model), torch.random.fork_rng(devices=[]):
            verb(view, *args, **kwargs)
    except ValueError as error:
        if _NO_TARGET not in str(error):
            raise
        return False
    if verb.__name__ in _ADDING:
        # Where the tree had no target, the model does not know of the adapter yet.
        vars(model)["peft_config"] = {**vars(view).get("peft_config", {}), **vars(model).get("peft_config", {})}
        vars(model)["_hf_peft_config_loaded"] = True
    return True


def _unfuse_waiting(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the verb of pipelines that walks the modules of models itself."""

    @functools.wraps(verb)
    def unfuse_lora(self: LoraBaseMixin, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        from diffusers.loaders.peft import PeftAdapterMixin

        verb(self, components, **kwargs)
        for name in components or self._lora_loadable_modules:
            model: Any = getattr(self, name, None)
            if isinstance(model, ModelMixin) and isinstance(model, PeftAdapterMixin) and _waiting_parts(model):
                model.unfuse_lora()

    return unfuse_lora


def _waiting_parts(model: ModelMixin) -> dict[str, nn.Module]:
    """Return the outermost parts of the installed graft, or of the original, that are not in the tree, by path."""
    graft = get_graft(model)
    if graft is None or graft.is_standalone:
        return {}
    parts = graft.originals if is_enabled(model) else graft.seats
    return {path: part for path, part in parts.items() if not any(path.startswith(f"{outer}.") for outer in parts)}


def _view_of(model: ModelMixin, waiting: dict[str, nn.Module]) -> ModelMixin:
    """Return a model of the same class that holds the waiting parts alone."""
    in_tree = {id(base_layer(module)) for module in model.modules()}
    view = copy_shallow(model)
    view._modules = {}
    for name in ("_graft", "_graft_enabled"):
        vars(view).pop(name, None)
    if "peft_config" in vars(model):
        # A verb that adds an adapter to the model would put its name here too, and find it in use.
        vars(view)["peft_config"] = dict(model.peft_config)
    for path, part in waiting.items():
        for name, layer in list(part.named_modules()):
            # Layers that the tree has as well were reached there, and come back with LoRA as it is then.
            if name and _is_adapted(layer) and id(base_layer(layer)) in in_tree:
                part.set_submodule(name, base_layer(layer))
        *between, last = path.split(".")
        holder: nn.Module = view
        for name in between:
            child = holder._modules.setdefault(name, nn.Module())
            assert child is not None
            holder = child
        holder._modules[last] = part
    return view


def _is_adapted(module: nn.Module) -> bool:
    return base_layer(module) is not module
