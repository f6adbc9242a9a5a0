"""Finding the parts of a model that can be replaced, by looking at its modules and at how their blocks call them."""

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
from .source import calls_of, passes_another_sequence, takes_one_tensor, text_comes_first


def find_sites(model: ModelMixin, *, blocks: bool = False) -> Sites:
    """Every replaceable part of a model, in forward order; the same sites before and after grafting.

    Nothing is run, so models on the meta device are read too.

    Args:
        blocks: list whole blocks, and pairs of them, behind the parts inside them.

    Raises:
        ModelError: not a diffusers model.
    """
    require_model(model)
    seen: Counter[str] = Counter()
    sites, inside = [], ""
    attending = {id(module) for _, module, parent in walk(model) for module in (module, parent) if _attends(module)}
    for path, module, parent in walk(model):
        if inside and path.startswith(inside):
            continue
        if (hidden := getattr(module, "graft_parts", None)) is not None:  # of a removed block
            sites += hidden
            seen.update(part.kind for part in hidden)
            continue
        site = getattr(module, "graft_site", None) or _describe(path, module, parent, seen, attending)
        if site is not None:
            inside = f"{path}."
            seen[site.kind] += 1
            sites.append(site)
    found = Sites(sites)
    notes = map(str, inline_feed_forwards(model, found))
    return Sites([*found, *(block_sites(model, found) if blocks else ())], notes)


def require_model(model: Any) -> None:
    """Raise `ModelError` unless given a diffusers model; pipelines and compiled models are told apart, people pass
    those.
    """
    if isinstance(model, ModelMixin):
        return
    hint, parts = "", getattr(model, "components", None)
    if isinstance(parts, dict):
        denoisers = ("transformer", "transformer_2", "unet", "prior")
        names = [name for name in denoisers if isinstance(parts.get(name), ModelMixin)] or ["transformer"]
        hint = " That is a pipeline: pass its " + " or its ".join(f"{name}, pipe.{name}" for name in names) + "."
    elif isinstance(getattr(model, "_orig_mod", None), ModelMixin):
        hint = " That is a compiled model: graft the model itself (model._orig_mod), then compile it."
    raise ModelError(f"A graft needs a diffusers model (a ModelMixin); got {type(model).__name__}.{hint}")


def _attends(module: nn.Module | None) -> bool:
    """Whether a module is an attention with a processor, or the seat of a graft that replaces one."""
    if (site := getattr(module, "graft_site", None)) is not None:
        return site.kind.endswith("attention")
    return getattr(module, "processor", None) is not None and _first_number(module, _HEADS) is not None


def _describe(
    path: str, module: nn.Module, parent: nn.Module | None, seen: Counter[str], attending: set[int]
) -> Site | None:
    name = path.rpartition(".")[2]
    if _attends(module):
        kind, heads = _attention_kind(module, parent, name), _first_number(module, _HEADS)
        return AttentionSite(
            kind=kind,
            index=seen[kind],
            path=path,
            width=_width(module),
            heads=heads,
            head_width=_head_width(module, heads),
        )
    if parent is not None and _is_feed_forward(module, parent, name, attending):
        width = _width(module)
        hidden = max((layer[0] for layer in _layers(module) if layer[1] == width), default=width)
        return FeedForwardSite(
            kind="feed_forward",
            index=seen["feed_forward"],
            path=path,
            width=width,
            hidden=hidden,
            activation=activation_of(module),
        )
    return None


def _attention_kind(attention: nn.Module, parent: nn.Module | None, name: str) -> str:
    """By how the block calls it; where that depends, by what the module says of itself."""
    other = passes_another_sequence(type(parent), name, type(attention).forward.__get__(attention))
    if other is False:
        return "self_attention"
    joins = text_comes_first(type(attention.processor)) is not None
    if joins and (other or getattr(attention, "added_kv_proj_dim", None) is not None):
        return "joint_attention"
    says = getattr(attention, "is_cross_attention", None)
    if says:
        return "cross_attention"
    # diffusers' own Attention is also called with a second sequence that is None at run time; others are believed.
    classes = (type(part).__name__ for part in (attention, attention.processor, parent))
    named = any("cross" in word.lower() for word in (name, *classes))
    crosses = (other and not isinstance(attention, Attention)) or (named and (other or says is None))
    return "cross_attention" if crosses else "self_attention"


def _is_feed_forward(module: nn.Module, parent: nn.Module, name: str, attending: set[int]) -> bool:
    """Called with one tensor by a block that also attends, and gives back as many features as it took."""
    if isinstance(parent, ModelMixin) or not _takes_one_tensor(module, parent, name):
        return False
    if not any(
        id(part) in attending for sibling in parent.children() if sibling is not module for part in sibling.modules()
    ):
        return False
    if any(id(part) in attending for part in module.modules()):
        return False
    layers = _layers(module)
    return isinstance(module, FeedForward) or (len(layers) > 1 and any(layer[1] == layers[0][0] for layer in layers))


def _takes_one_tensor(module: nn.Module, parent: nn.Module, name: str) -> bool:
    """As its block calls it; diffusers' own FeedForward takes one anyway, wherever it is called from."""
    calls = [takes_one_tensor(call) for call in calls_of(type(parent), name)]
    return any(calls) or not calls if isinstance(module, FeedForward) else bool(calls) and all(calls)


_HEADS = ("heads", "num_heads", "num_attention_heads")


def _first_number(module: nn.Module | None, names: tuple[str, ...]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if type(value) is int), None)


def _layers(module: nn.Module) -> list[tuple[int, int]]:
    """(features in, features out) of linear and convolutional layers; LoRA counts with the layer it adapts."""
    return list(_layers_below(module))


def _layers_below(module: nn.Module) -> Iterator[tuple[int, int]]:
    for child in module.children():
        sizes = [
            (getattr(child, f"in_{unit}", None), getattr(child, f"out_{unit}", None))
            for unit in ("features", "channels")
        ]
        size = next((pair for pair in sizes if type(pair[0]) is int and type(pair[1]) is int), None)
        if size is None:
            yield from _layers_below(child)
        else:
            yield size


def _width(module: nn.Module) -> int:
    """Features of a token entering the part."""
    return _first_number(module, ("query_dim",)) or _layers(module)[0][0]


def _head_width(attention: nn.Module, heads: int) -> int:
    width = _first_number(attention, ("head_dim", "dim_heads"))
    projection = getattr(attention, "to_q", None) or getattr(attention, "to_query", None)
    inner = _first_number(attention, ("inner_dim",)) or _first_number(projection, ("out_features",))
    return width or (inner or _layers(attention)[-1][0]) // heads
