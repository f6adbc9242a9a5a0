"""Going through a model's modules in the order in which a forward reaches them, without running it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, zip_longest

from torch import nn

from .source import order_of_use

Step = tuple[str, nn.Module, nn.Module | None]


def walk(
    module: nn.Module, path: str = "", parent: nn.Module | None = None, seen: set[int] | None = None
) -> Iterator[Step]:
    """(path, module, parent) of every module, itself first; what a graft added is left out."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module, parent
    if hasattr(module, "graft_site"):
        return
    for group in _in_order(module):
        together = (
            [list(_items(name, child, module)) for name, child in group] if len(group) > 1 else [[(*group[0], module)]]
        )
        for row in zip_longest(*together):
            for name, child, holder in filter(None, row):
                yield from walk(child, f"{path}.{name}" if path else name, holder, seen)


def _items(name: str, child: nn.Module, module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    if not isinstance(child, nn.ModuleList):
        yield name, child, module
        return
    for index, item in child.named_children():
        yield f"{name}.{index}", item, child


def _in_order(module: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Children in order of use, in groups that are walked together; one never named follows its elder sister."""
    ranks, last, ranked = order_of_use(type(module)), -1, []
    for name, child in module.named_children():
        if name == "graft":
            continue
        last = ranks.get(name, last)
        ranked.append((last, name in ranks, name, child))
    for _, group in groupby(sorted(ranked, key=lambda entry: entry[0]), key=lambda entry: entry[0]):
        group = list(group)
        lists = [entry[2:] for entry in group if entry[1] and isinstance(entry[3], nn.ModuleList)]
        if len(lists) > 1:
            yield lists
        yield from ([entry[2:]] for entry in group if len(lists) < 2 or entry[2:] not in lists)
