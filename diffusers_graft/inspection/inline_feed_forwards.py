"""Feed-forwards that are no module: their block, or its attention, calls the linear layers itself.

Nothing can replace them at a path, so they are no site; the report of sites names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diffusers import ModelMixin
from torch import nn

from ..core.sites import AttentionSite, Site
from .source import calls_of


@dataclass(frozen=True)
class Inline:
    """An inline feed-forward of one class.

    Attributes:
        owner: name of the class that calls the layers.
        layers: their names inside it.
        paths: of its modules in the model.
    """

    owner: str
    layers: tuple[str, ...]
    paths: tuple[str, ...]

    def __str__(self) -> str:
        layers = ", ".join(self.layers)
        return f"{self.owner} x {len(self.paths)}: its feed-forward is inline ({layers}), which is no site"


def inline_feed_forwards(model: ModelMixin, sites: Iterable[Site]) -> tuple[Inline, ...]:
    """Return the inline feed-forwards of a model, one entry a class, in forward order."""
    sites = list(sites)
    have_feed_forward = {_holder(site) for site in sites if site.kind == "feed_forward"}
    modules = dict(model.named_modules())
    paths: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
    for site in sites:
        # Attentions inside a removed block are sites without a module.
        if not isinstance(site, AttentionSite) or site.path not in modules:
            continue
        holders = {site.path: _layers_inside(modules[site.path], site)}
        # A block has one feed-forward; what it calls besides are other projections.
        if _holder(site) not in have_feed_forward:
            holders[_holder(site)] = _layers_beside(modules[_holder(site)], site)
        for path, layers in holders.items():
            if layers:
                owner = type(modules[path]).__name__
                paths.setdefault((owner, layers), {})[path] = None
    return tuple(Inline(owner, layers, tuple(found)) for (owner, layers), found in paths.items())


def _holder(site: Site) -> str:
    return site.path.rpartition(".")[0]


def _layers_inside(attention: nn.Module, site: AttentionSite) -> tuple[str, ...]:
    """Return the layers of an attention that are a feed-forward's.

    An attention makes queries, keys and values, three times what its output reads; the rest is a feed-forward's.
    """
    return _widening_and_back(_sizes(attention), site, made=3 * site.inner_width, read=site.inner_width)


def _layers_beside(block: nn.Module, site: AttentionSite) -> tuple[str, ...]:
    """Return the layers that a block calls itself and that are a feed-forward's."""
    called = {name: size for name, size in _sizes(block).items() if calls_of(type(block), name)}
    return _widening_and_back(called, site, made=0, read=0)


def _sizes(owner: nn.Module) -> dict[str, tuple[int, int]]:
    """Return features in and out of the linear layers right inside a module, by name."""
    sizes = {}
    for name, child in owner.named_children():
        features = getattr(child, "in_features", None)
        wider = getattr(child, "out_features", None)
        if isinstance(features, int) and isinstance(wider, int):
            sizes[name] = (features, wider)
    return sizes


def _widening_and_back(
    sizes: dict[str, tuple[int, int]], site: AttentionSite, *, made: int, read: int
) -> tuple[str, ...]:
    """Return layers that widen tokens beyond `made` features, and those that narrow more than `read` of them again."""
    widening = {name for name, (before, after) in sizes.items() if before == site.width and after > made}
    back = {name for name, (before, after) in sizes.items() if after == site.width and before > read} - widening
    if not widening or not back:
        return ()
    return tuple(name for name in sizes if name in widening | back)
