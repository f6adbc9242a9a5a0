"""How a model walks a list of its blocks, read from its source: what it tells each of them, and what it reads of them."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Collection, Iterable, Iterator

from diffusers import ModelMixin

from .source import parameters_of, tree_of

Chain = tuple[str, ...]


@functools.cache
def apart(holder: type, name: str, block: type, streams: tuple[str, ...]) -> str | None:
    """Why blocks in the list `name` of a class are no neighbours, or are not told the same; None where nothing says
    so.
    """
    for loop in _loops(holder, name):
        variable, others = _variables(loop, name)
        if lists := [other for other in _walked(loop) if other != name]:
            return f"{lists[0]} run between them"
        own = _own_names(loop, variable, others)
        for parameter, value in _told(loop, variable, parameters_of(block)):
            if parameter not in streams and not _asks_for_none(value) and own & _names(value):
                return f"each {block.__name__} is told its own {parameter}, so neighbours cannot get the same input"
    return None


def read_from_outside(model: ModelMixin, path: str) -> set[Chain]:
    """What a model's forward reads of a block itself, as chains of names: `("norm1", "emb")` of DiT's first block."""
    name, _, number = path.rpartition(".")
    tree = tree_of(type(model).forward)
    variables = {f"self.{name}[{number}]"} | {_variables(loop, name)[0] for loop in _loops(type(model), name)}
    chains = set(_chains(tree, variables)) if tree is not None else set()
    return {chain for chain in chains if not any(other != chain and other[: len(chain)] == chain for other in chains)}


def _chains(tree: ast.AST, variables: Collection[str]) -> Iterator[Chain]:
    for node in ast.walk(tree):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name | ast.Subscript) and ast.unparse(node) in variables:
            yield tuple(chain)


def _loops(holder: type, name: str) -> Iterator[ast.For | ast.comprehension]:
    """Loops over a list of blocks, one at a time or beside other lists, in the forward of a class and its own methods."""
    methods = [getattr(holder, "forward", None), *vars(holder).values()]
    for tree in filter(None, map(tree_of, dict.fromkeys(filter(inspect.isfunction, methods)))):
        for node in ast.walk(tree):
            if isinstance(node, ast.For | ast.comprehension) and name in _walked(node):
                yield node


def _walked(loop: ast.For | ast.comprehension) -> list[str]:
    """Children of the model that a loop goes through: of `enumerate(zip(self.a, self.b))` both."""
    return [
        node.attr
        for node in _entries(loop.iter)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    ]


def _entries(iterated: ast.AST) -> list[ast.AST]:
    while isinstance(iterated, ast.Call) and getattr(iterated.func, "id", None) == "enumerate":
        iterated = iterated.args[0]
    zipped = isinstance(iterated, ast.Call) and getattr(iterated.func, "id", None) == "zip"
    return list(iterated.args) if zipped else [iterated]


def _variables(loop: ast.For | ast.comprehension, name: str) -> tuple[str, set[str]]:
    """The variable that holds the block, and the others of a loop, such as its index."""
    names = [node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)]
    entries = [node.attr if isinstance(node, ast.Attribute) else "" for node in _entries(loop.iter)]
    variable = names[len(names) - len(entries) + entries.index(name)]
    return variable, set(names) - {variable}


def _own_names(loop: ast.AST, variable: str, own: set[str]) -> set[str]:
    """Names that mean something else in each turn: the index, and what is made from it.

    What blocks carry on is none of them, and neither is what only some callers pass, such as a cache: `if x is not
    None`.
    """
    assignments = list(_assignments(loop))
    carried = {name for targets, value in assignments if variable in _names(value) for name in targets}
    while True:
        more = {name for targets, value in assignments if own & _names(value) for name in targets} - carried - own
        if not more:
            return own
        own = own | more


def _assignments(node: ast.AST) -> Iterator[tuple[set[str], ast.AST]]:
    if _asks_for_none(node):
        return
    if isinstance(node, ast.Assign) and not _asks_for_none(node.value):
        yield {name for target in node.targets for name in _names(target)}, node.value
    if isinstance(node, ast.AugAssign):
        yield _names(node.target), node.value
    for child in ast.iter_child_nodes(node):
        yield from _assignments(child)


def _asks_for_none(node: ast.AST) -> bool:
    return isinstance(node, ast.If | ast.IfExp) and any(
        isinstance(part, ast.Is | ast.IsNot) for part in ast.walk(node.test)
    )


def _told(loop: ast.AST, variable: str, parameters: Iterable[str]) -> Iterator[tuple[str, ast.AST]]:
    """What the calls of a block give it, by parameter; gradient checkpointing is given the block first."""
    for call in (node for node in ast.walk(loop) if isinstance(node, ast.Call)):
        given = [*([call.func] if getattr(call.func, "id", None) == variable else []), *call.args]
        if given and getattr(given[0], "id", None) == variable and not any(isinstance(x, ast.Starred) for x in given):
            yield from zip(parameters, given[1:], strict=False)
            yield from ((word.arg, word.value) for word in call.keywords if word.arg)


def _names(node: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
