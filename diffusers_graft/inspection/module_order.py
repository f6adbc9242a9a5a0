"""A model's modules in the order in which a forward reaches them, without running it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, zip_longest
from typing import NamedTuple

from torch import nn

from .source import order_of_use


class Step(NamedTuple):
    """A module on the way: its path, itself, and the module that holds it."""

    path: str
    module: nn.Module
    parent: nn.Module | None


def walk(model: nn.Module) -> Iterator[Step]:
    """Go through all modules of a model, itself first; what a graft added is left out."""
    yield from _walk(Step("", model, None), set())


def _walk(step: Step, seen: set[int]) -> Iterator[Step]:
    if id(step.module) in seen:
        return
    seen.add(id(step.module))
    yield step
    if hasattr(step.module, "graft_site"):
        return
    for group in _groups(step.module):
        lists = [list(_entries(name, child, step.module, is_alone=len(group) == 1)) for name, child in group]
        # Lists that one loop walks together give their first entries, then their second ones.
        for row in zip_longest(*lists):
            for entry in filter(None, row):
                path = f"{step.path}.{entry.path}" if step.path else entry.path
                yield from _walk(entry._replace(path=path), seen)


def _entries(name: str, child: nn.Module, parent: nn.Module, *, is_alone: bool) -> Iterator[Step]:
    if is_alone or not isinstance(child, nn.ModuleList):
        yield Step(name, child, parent)
        return
    for index, item in child.named_children():
        yield Step(f"{name}.{index}", item, child)


def _groups(module: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Go through the children in order of use, in groups that are walked together.

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
