"""Sites of a model: its parts that can be replaced, found by its modules and by how their blocks call them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from diffusers import ModelMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from ..core.sites import AttentionSite, FeedForwardSite, Site, Sites
from ..errors import ModelError
from .blocks import block_sites
from .inline_feed_forwards import inline_feed_forwards
from .module_order import walk
from .pretrained_weights import activation_of
from .source import calls_of, names_used, passes_another_sequence, takes_one_tensor, text_comes_first

_HEADS = ("heads", "num_heads", "num_attention_heads")
_DENOISERS = ("transformer", "transformer_2", "unet", "prior")


def find_sites(model: ModelMixin, *, blocks: bool = False) -> Sites:
    """Find every replaceable part of a model, in forward order; the same sites before and after grafting.

    Nothing is run, so models on the meta device are read too.

    Args:
        blocks: list blocks too, and pairs of them, behind the parts inside them.

    Raises:
        ModelError: not a diffusers model.
    """
    require_model(model)
    entries = list(walk(model))
    # Found first: a feed-forward is known by the attention beside it, which may come later.
    attending: set[int] = set()
    for entry in entries:
        attending.update(id(module) for module in (entry.module, entry.parent) if _attends(module))
    counts: Counter[str] = Counter()
    sites: list[Site] = []
    inside = None
    for path, module, parent in entries:
        # Attentions and feed-forwards hold no further sites.
        if inside is not None and path.startswith(inside):
            continue
        # What replaces a removed block knows the parts that were in it.
        removed = getattr(module, "graft_parts", None)
        if removed is not None:
            sites += removed
            counts.update(site.kind for site in removed)
            continue
        site = getattr(module, "graft_site", None)
        if site is None:
            site = _describe(model, path, module, parent, counts, attending)
        if site is not None:
            inside = f"{path}."
            counts[site.kind] += 1
            sites.append(site)
    notes = map(str, inline_feed_forwards(model, sites))
    if blocks:
        sites += block_sites(model, Sites(sites))
    return Sites(sites, notes)


def require_model(model: Any) -> None:
    """Raise `ModelError` unless given a diffusers model, with what to pass for pipelines and compiled models."""
    if isinstance(model, ModelMixin):
        return
    hint = ""
    components = getattr(model, "components", None)
    if isinstance(components, dict):
        names = [name for name in _DENOISERS if isinstance(components.get(name), ModelMixin)] or ["transformer"]
        hint = " That is a pipeline: pass its " + " or its ".join(f"{name}, pipe.{name}" for name in names) + "."
    elif isinstance(getattr(model, "_orig_mod", None), ModelMixin):
        hint = " That is a compiled model: graft the model itself (model._orig_mod), then compile it."
    raise ModelError(f"A graft needs a diffusers model (a ModelMixin); got {type(model).__name__}.{hint}")


def _attends(module: nn.Module | None) -> bool:
    """Return whether a module is an attention with a processor, or the seat of a graft that replaces one."""
    site = getattr(module, "graft_site", None)
    if site is not None:
        return site.kind.endswith("attention")
    return getattr(module, "processor", None) is not None and _first_number(module, _HEADS) is not None


def _describe(
    model: ModelMixin,
    path: str,
    module: nn.Module,
    parent: nn.Module | None,
    counts: Counter[str],
    attending: set[int],
) -> Site | None:
    """Return the site that a module is, None for one that cannot be replaced."""
    name = path.rpartition(".")[2]
    if parent is None:
        return None
    heads = _first_number(module, _HEADS)
    if heads is not None and _attends(module):
        if _is_never_called(model, parent, name):
            return None
        kind = _attention_kind(module, parent, name)
        return AttentionSite(
            kind=kind,
            index=counts[kind],
            path=path,
            width=_width(module),
            heads=heads,
            head_width=_head_width(module, heads),
        )
    if _is_feed_forward(module, parent, name, attending) and not _is_never_called(model, parent, name):
        width = _width(module)
        return FeedForwardSite(
            kind="feed_forward",
            index=counts["feed_forward"],
            path=path,
            width=width,
            hidden=max((features for features, wider in _layers(module) if wider == width), default=width),
            activation=activation_of(module),
        )
    return None


def _is_never_called(model: ModelMixin, parent: nn.Module, name: str) -> bool:
    """Return whether no module of a model names a part that it holds: SanaWM's refiner has such."""
    names = names_used(type(parent))
    # Entries of a list are called by their place.
    if name.isdigit() or names is None or name in names:
        return False
    # Asked of all, since a block may call what is inside its own blocks.
    for cls in set(map(type, model.modules())):
        names = names_used(cls)
        if names is None or name in names:
            return False
    return True


def _attention_kind(attention: nn.Module, parent: nn.Module, name: str) -> str:
    """Return the kind by how the block calls it; where that depends, by what the module says of itself."""
    other = passes_another_sequence(type(parent), name, type(attention).forward.__get__(attention))
    if other is False:
        return "self_attention"
    joins = text_comes_first(type(attention.processor)) is not None
    if joins and (other or getattr(attention, "added_kv_proj_dim", None) is not None):
        return "joint_attention"
    says_cross = getattr(attention, "is_cross_attention", None)
    if says_cross:
        return "cross_attention"
    # diffusers' own Attention is also called with a second sequence that is None at run time; others are believed.
    if other and not isinstance(attention, Attention):
        return "cross_attention"
    classes = (type(part).__name__ for part in (attention, attention.processor, parent))
    is_named_cross = any("cross" in word.lower() for word in (name, *classes))
    if is_named_cross and (other or says_cross is None):
        return "cross_attention"
    return "self_attention"


def _is_feed_forward(module: nn.Module, parent: nn.Module, name: str, attending: set[int]) -> bool:
    """Return whether a block that also attends calls the module with one tensor and gets as many features back."""
    if isinstance(parent, ModelMixin) or not _takes_one_tensor(module, parent, name):
        return False
    # Embedders and projections at the ends of a model widen and narrow as well, and have no attention beside them.
    siblings = [sibling for sibling in parent.children() if sibling is not module]
    if not any(_contains(sibling, attending) for sibling in siblings) or _contains(module, attending):
        return False
    if isinstance(module, FeedForward):
        return True
    layers = _layers(module)
    return len(layers) > 1 and any(wider == layers[0][0] for _, wider in layers)


def _contains(module: nn.Module, attending: set[int]) -> bool:
    return any(id(part) in attending for part in module.modules())


def _takes_one_tensor(module: nn.Module, parent: nn.Module, name: str) -> bool:
    calls = [takes_one_tensor(call) for call in calls_of(type(parent), name)]
    if isinstance(module, FeedForward):
        # It takes one tensor wherever it is called from.
        return any(calls) or not calls
    return bool(calls) and all(calls)


def _first_number(module: nn.Module | None, names: tuple[str, ...]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if type(value) is int), None)


def _layers(module: nn.Module) -> list[tuple[int, int]]:
    """Return (features in, features out) of linear and convolutional layers; LoRA counts with the layer it adapts."""
    return list(_layers_below(module))


def _layers_below(module: nn.Module) -> Iterator[tuple[int, int]]:
    for child in module.children():
        features = _first_number(child, ("in_features", "in_channels"))
        wider = _first_number(child, ("out_features", "out_channels"))
        if features is None or wider is None:
            yield from _layers_below(child)
        else:
            yield features, wider


def _width(module: nn.Module) -> int:
    """Return the features of a token that enters the part."""
    return _first_number(module, ("query_dim",)) or _layers(module)[0][0]


def _head_width(attention: nn.Module, heads: int) -> int:
    width = _first_number(attention, ("head_dim", "dim_heads"))
    if width:
        return width
    projection = getattr(attention, "to_q", None) or getattr(attention, "to_query", None)
    inner = _first_number(attention, ("inner_dim",)) or _first_number(projection, ("out_features",))
    return (inner or _layers(attention)[-1][0]) // heads
