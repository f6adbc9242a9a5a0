"""Hooks of diffusers and accelerate: which of them are refused, and how the others follow parts that are exchanged.

diffusers.hooks imports peft, which takes longer than all of this package; so functions here import it.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diffusers import ModelMixin
from torch import nn

from ..core.sites import Site
from ..errors import OperatorError, StateError
from .module_copy import is_hooked

_GROUP_OFFLOADING = "group_offloading"
_OFFLOADING = (_GROUP_OFFLOADING, "layer_execution_tracker", "lazy_prefetch_group_offloading")
_STORAGE_HOOKS = {*_OFFLOADING, "layerwise_casting", "peft_autocast_disable"}
_SKIPPED = "_skip_layerwise_casting_patterns"
# Folders of our own, inside the one that the user named.
_FRESH = "graft-"


def refuse_hooked(original: nn.Module, site: Site) -> None:
    """Raise `OperatorError` for a part whose forward hooks replaced: a copy of it would run the original's."""
    cached = _hook_names(original) - _STORAGE_HOOKS
    if is_hooked(original) and cached:
        raise OperatorError(
            f"{site.path} carries hooks of a cache or a guider ({', '.join(sorted(cached))}). Remove them (a cache by "
            "model.disable_cache()), graft, and enable them again."
        )
    if is_hooked(original) or any(hasattr(module, "_hf_hook") for module in original.modules()):
        raise OperatorError(
            f"{site.path} carries offloading or casting hooks. Graft first, then enable offloading or layerwise "
            "casting."
        )


def refuse_moving_hooked(model: ModelMixin, parts: dict[str, nn.Module]) -> None:
    """Raise `StateError` where parts that leave would lose what hooks hold for them."""
    for path, module in model.named_modules():
        if path and hasattr(module, "_hf_hook"):
            raise StateError(
                f"accelerate keeps the weights of {path} elsewhere, where parts that change places would lose them. "
                "Call pipe.remove_all_hooks() first, or remove_hook_from_submodules(model) of accelerate.hooks; "
                "offload again afterwards."
            )
    for path in parts:
        leaving = model.get_submodule(path)
        cached = _hook_names(leaving) - _STORAGE_HOOKS
        if cached and is_hooked(leaving):
            raise StateError(
                f"{path} carries hooks of a cache or a guider ({', '.join(sorted(cached))}), which would not follow "
                "the part that takes its place. Remove them (a cache by model.disable_cache()) first."
            )


def _hook_names(module: nn.Module) -> set[str]:
    """Return the names of diffusers' hooks on one module."""
    registry = vars(module).get("_diffusers_hook")
    return set(getattr(registry, "hooks", ()))


def is_skippable(feed_forward: nn.Module) -> bool:
    """Return whether hooks of diffusers that skip feed-forwards find this one."""
    from diffusers.hooks._common import _FEEDFORWARD_CLASSES

    return isinstance(feed_forward, _FEEDFORWARD_CLASSES)


def register_processor(cls: type, original: type) -> None:
    """Let hooks, which look processors up by their exact class, know one as the original.

    Where diffusers does not know the original either, nothing is done.
    """
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    with contextlib.suppress(ValueError):
        AttentionProcessorRegistry.register(cls, AttentionProcessorRegistry.get(original))


def register_block(cls: type, original: type) -> None:
    """Let hooks, which look blocks up by their exact class, know one as the original."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    with contextlib.suppress(ValueError):
        metadata = copy.copy(TransformerBlockRegistry.get(original))
        TransformerBlockRegistry.register(cls, metadata)
        # Arguments are looked up in the signature of this class.
        metadata._cls = original


def load_from_disk(model: ModelMixin) -> None:
    """Bring weights that group offloading keeps on disk into memory, where they stay until the next forward."""
    for module in model.modules():
        registry = vars(module).get("_diffusers_hook")
        group = getattr(getattr(registry, "hooks", {}).get(_GROUP_OFFLOADING), "group", None)
        # A group that was never offloaded has no file yet; its weights are in memory.
        if group is not None and getattr(group, "_is_offloaded_to_disk", False):
            group.onload_()


@contextlib.contextmanager
def without_group_offloading(model: ModelMixin, *, from_disk_only: bool = False) -> Iterator[None]:
    """Take group offloading off inside, weights in memory, and register it anew for the parts that are there then.

    Args:
        model: offloaded or not.
        from_disk_only: leave weights that wait in memory where they are.
    """
    from diffusers.hooks import HookRegistry, group_offloading

    # Older releases of diffusers cannot register anew.
    find = getattr(group_offloading, "_get_top_level_group_offload_hook", lambda model: None)
    config = getattr(find(model), "config", None)
    folder = getattr(config, "offload_to_disk_path", None)
    if config is None or (from_disk_only and not folder):
        yield
        return
    load_from_disk(model)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for name in _OFFLOADING:
        registry.remove_hook(name, recurse=True)
    try:
        yield
    finally:
        if folder:
            config.offload_to_disk_path = _fresh_folder(Path(folder))
        group_offloading._apply_group_offloading(model, config)


def _fresh_folder(folder: Path) -> str:
    """Make a folder inside the user's, in place of the one made last.

    diffusers names its files by group and reads those that exist: it would find the weights of other parts.
    """
    if folder.name.startswith(_FRESH):
        shutil.rmtree(folder, ignore_errors=True)
        folder = folder.parent
    return tempfile.mkdtemp(prefix=_FRESH, dir=folder)


def skip_layerwise_casting(model: ModelMixin, *, of_grafts: bool) -> None:
    """Set whether layerwise casting, enabled later, leaves the operators of grafts as they are."""
    vars(model).pop(_SKIPPED, None)
    if of_grafts:
        patterns = type(model)._skip_layerwise_casting_patterns or ()
        vars(model)[_SKIPPED] = (*patterns, r"\.graft\.")


def require_weights(path: str, operator: nn.Module) -> None:
    """Raise `StateError` for an operator that accelerate offloads layer by layer.

    accelerate brings the weights of a layer as that layer is called. Operators also read weights of layers that they
    do not call, and would read empty memory.
    """
    layers = [layer for layer in operator.modules() if layer is not operator and "_hf_hook" in vars(layer)]
    if any(parameter.is_meta for layer in layers for parameter in layer.parameters()):
        raise StateError(
            f"{operator.name} at {path} is offloaded layer by layer, and may read weights of layers that it does not "
            "call. Call pipe.remove_all_hooks(), then pipe.enable_model_cpu_offload(), or offload blocks in groups."
        )
