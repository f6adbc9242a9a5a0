"""Loops over blocks, from the source of a model: what it passes to each of them, and what it reads of them."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Collection, Iterable, Iterator

from diffusers import ModelMixin

from .source import calls_in, forward_tree, names_in, parameters_of, tree_of, walk_tree

Chain = tuple[str, ...]
Loop = ast.For | ast.comprehension


@functools.cache
def find_separation(holder: type, name: str, block: type, streams: tuple[str, ...]) -> str | None:
    """Return why blocks in a list of a class are no neighbours, or get different inputs; None where nothing says so.

    Args:
        holder: the class whose forward walks the list.
        name: of the list in it.
        block: class of the blocks.
        streams: arguments that blocks carry on, which differ from block to block anyway.
    """
    for loop in _loops(holder, name):
        beside = [other for other in _walked_lists(loop) if other != name]
        if beside:
            return f"{beside[0]} run between them"
        variable, others = _loop_variables(loop, name)
        changing = _changing_names(loop, variable, others)
        for parameter, value in _passed_arguments(loop, variable, parameters_of(block)):
            if parameter in streams or _tests_for_none(value):
                continue
            if changing & names_in(value):
                return f"each {block.__name__} gets its own {parameter}, so neighbours cannot get the same input"
    return None


def read_from_outside(model: ModelMixin, path: str) -> set[Chain]:
    """Return what a model's forward reads of a block, as chains of names: `("norm1", "emb")` of DiT's first block."""
    name, _, number = path.rpartition(".")
    variables = {f"self.{name}[{number}]"}
    variables |= {_loop_variables(loop, name)[0] for loop in _loops(type(model), name)}
    chains = set(_chains(forward_tree(type(model)), variables))
    # Of `block.norm1.emb` the walk meets `block.norm1` too.
    beginnings: set[Chain] = set()
    for chain in chains:
        beginnings.update(chain[:length] for length in range(1, len(chain)))
    return chains - beginnings


def _chains(tree: ast.AST | None, variables: Collection[str]) -> Iterator[Chain]:
    """Go through the attributes of attributes that are read of some variables."""
    for node in walk_tree(tree):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name | ast.Subscript) and ast.unparse(node) in variables:
            yield tuple(chain)


def _loops(holder: type, name: str) -> Iterator[Loop]:
    """Go through the loops over a list of blocks in the methods of a class, its inherited forward included."""
    methods = [getattr(holder, "forward", None), *vars(holder).values()]
    for method in dict.fromkeys(filter(inspect.isfunction, methods)):
        for node in walk_tree(tree_of(method)):
            if isinstance(node, Loop) and name in _walked_lists(node):
                yield node


def _walked_lists(loop: Loop) -> list[str]:
    """Return the children of the model that a loop walks: for `enumerate(zip(self.a, self.b))` both."""
    lists = []
    for node in _iterated(loop.iter):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            lists.append(node.attr)
    return lists


def _iterated(iterated: ast.expr) -> list[ast.expr]:
    """Return what is walked side by side, without `enumerate` and `zip` around it."""
    while isinstance(iterated, ast.Call) and getattr(iterated.func, "id", None) == "enumerate":
        iterated = iterated.args[0]
    if isinstance(iterated, ast.Call) and getattr(iterated.func, "id", None) == "zip":
        return list(iterated.args)
    return [iterated]


def _loop_variables(loop: Loop, name: str) -> tuple[str, set[str]]:
    """Return the variable that holds the block, and the others of a loop, such as its index."""
    names = [node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)]
    lists = [getattr(node, "attr", "") for node in _iterated(loop.iter)]
    # The index of `enumerate` comes before the variables of the lists.
    variable = names[len(names) - len(lists) + lists.index(name)]
    return variable, set(names) - {variable}


def _changing_names(loop: Loop, variable: str, changing: set[str]) -> set[str]:
    """Return the names that mean something else in each turn: the index, and what is computed from it.

    What blocks carry on is none of them, and neither is what only some callers pass, such as a cache:
    `if x is not None`.
    """
    assignments = list(_assignments(loop))
    carried: set[str] = set()
    for targets, value in assignments:
        if variable in names_in(value):
            carried |= targets
    # What is computed from a changing name changes too, and so on.
    while True:
        more: set[str] = set()
        for targets, value in assignments:
            if changing & names_in(value):
                more |= targets
        more -= carried | changing
        if not more:
            return changing
        changing = changing | more


def _assignments(node: ast.AST) -> Iterator[tuple[set[str], ast.expr]]:
    """Go through the assignments inside a loop, as the names assigned and the value."""
    if _tests_for_none(node):
        return
    if isinstance(node, ast.Assign) and not _tests_for_none(node.value):
        yield set().union(*map(names_in, node.targets)), node.value
    if isinstance(node, ast.AugAssign):
        yield names_in(node.target), node.value
    for child in ast.iter_child_nodes(node):
        yield from _assignments(child)


def _tests_for_none(node: ast.AST) -> bool:
    if not isinstance(node, ast.If | ast.IfExp):
        return False
    return any(isinstance(part, ast.Is | ast.IsNot) for part in ast.walk(node.test))


def _passed_arguments(loop: Loop, variable: str, parameters: Iterable[str]) -> Iterator[tuple[str, ast.expr]]:
    """Go through what the calls of a block pass to it, by parameter."""
    for call in calls_in(loop):
        given = list(call.args)
        if getattr(call.func, "id", None) == variable:
            given.insert(0, call.func)
        # Gradient checkpointing is a call of something else, whose first argument is the block.
        if not given or getattr(given[0], "id", None) != variable:
            continue
        if any(isinstance(argument, ast.Starred) for argument in given):
            continue
        yield from zip(parameters, given[1:], strict=False)
        yield from ((word.arg, word.value) for word in call.keywords if word.arg)
