"""Feed-forwards that are no module: their block, or its attention, calls the linear layers itself.

Nothing can take their place at a path, so they are no site; the report of sites names them.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import ModelMixin
from torch import nn

from ..core.sites import Site, Sites
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
        return f"{self.owner} x {len(self.paths)}: its feed-forward is inline ({', '.join(self.layers)}), which is no site"


def inline_feed_forwards(model: ModelMixin, sites: Sites) -> tuple[Inline, ...]:
    """The inline feed-forwards of a model, one entry a class, in forward order."""
    found: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
    fed = {_holder(site) for site in sites if site.kind == "feed_forward"}
    there = {path for path, _ in model.named_modules()}
    for site in sites:
        if site.kind.endswith("attention") and site.path in there:  # not inside a removed block
            inside = [(site.path, 3 * site.inner_width, site.inner_width)]
            beside = [] if _holder(site) in fed else [(_holder(site), 0, 0)]
            for path, made, read in inside + beside:
                owner = model.get_submodule(path)
                if layers := _there_and_back(owner, site, made=made, read=read, called=path != site.path):
                    found.setdefault((type(owner).__name__, layers), {})[path] = None
    return tuple(Inline(owner, layers, tuple(paths)) for (owner, layers), paths in found.items())


def _holder(site: Site) -> str:
    return site.path.rpartition(".")[0]


def _there_and_back(owner: nn.Module, site: Site, *, made: int, read: int, called: bool) -> tuple[str, ...]:
    """Linear layers that widen tokens beyond `made` features, and that narrow more than `read` of them again.

    An attention makes queries, keys and values, three times what its output reads; the rest is a feed-forward's.
    """
    sizes = {
        name: (getattr(child, "in_features", None), getattr(child, "out_features", None))
        for name, child in owner.named_children()
        if not called or calls_of(type(owner), name)
    }
    sizes = {name: size for name, size in sizes.items() if None not in size}
    there = {name for name, (features, wider) in sizes.items() if features == site.width and wider > made}
    back = {name for name, (features, narrower) in sizes.items() if narrower == site.width and features > read} - there
    return tuple(name for name in sizes if name in there | back) if there and back else ()
