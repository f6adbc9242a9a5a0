"""A model's modules in the order in which a forward reaches them, without running it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, zip_longest
from typing import NamedTuple

from torch import nn

from .source import order_of_use


class Entry(NamedTuple):
    """A module of a model, with its path and the module that holds it."""

    path: str
    module: nn.Module
    parent: nn.Module | None


def walk(model: nn.Module) -> Iterator[Entry]:
    """Yield the modules of a model, the model first; those inside a graft's seats are left out."""
    yield from _walk(Entry("", model, None), set())


def _walk(entry: Entry, seen: set[int]) -> Iterator[Entry]:
    if id(entry.module) in seen:
        return
    seen.add(id(entry.module))
    yield entry
    if hasattr(entry.module, "graft_site"):
        return
    for group in _groups(entry.module):
        is_alone = len(group) == 1
        lists = [list(_entries(name, child, entry.module, is_alone=is_alone)) for name, child in group]
        # Lists that one loop walks together give their first entries, then their second ones.
        for row in zip_longest(*lists):
            for child in filter(None, row):
                path = f"{entry.path}.{child.path}" if entry.path else child.path
                yield from _walk(child._replace(path=path), seen)


def _entries(name: str, child: nn.Module, parent: nn.Module, *, is_alone: bool) -> Iterator[Entry]:
    if is_alone or not isinstance(child, nn.ModuleList):
        yield Entry(name, child, parent)
        return
    for index, item in child.named_children():
        yield Entry(f"{name}.{index}", item, child)


def _groups(module: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Yield the children in order of use, in groups of lists that one loop of the forward walks together.

    A child that the forward never names follows the one that was defined before it.
    """
    ranks = order_of_use(type(module))
    rank = -1
    ranked: list[tuple[int, str, nn.Module]] = []
    for name, child in module.named_children():
        if name != "graft":
            rank = ranks.get(name, rank)
            ranked.append((rank, name, child))
    ranked.sort(key=lambda entry: entry[0])
    for _, entries in groupby(ranked, key=lambda entry: entry[0]):
        group = [(name, child) for _, name, child in entries]
        lists = [entry for entry in group if entry[0] in ranks and isinstance(entry[1], nn.ModuleList)]
        if len(lists) < 2:
            yield from ([entry] for entry in group)
            continue
        yield lists
        yield from ([entry] for entry in group if entry not in lists)
