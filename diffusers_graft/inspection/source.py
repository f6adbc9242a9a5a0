"""Classes read from their source, without running them: which children a forward calls, in which order, with what.

A model on the meta device, or one of 57 blocks, is read as fast as a tiny one: every answer belongs to a class, and is
cached.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator

# Words in the names of the prompt's half where a processor joins two streams: [encoder_query, query],
# [img_key, txt_key], [k_i, k_t].
_TEXT_WORDS = ("encoder", "txt", "text", "und", "t")

Place = tuple[int, int]


@functools.cache
def tree_of(function: Callable) -> ast.FunctionDef | None:
    """Return the definition of a function or method, None where its source is missing."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    # A lambda comes as the statement that it is in.
    return definition if isinstance(definition, ast.FunctionDef) else None


def forward_tree(cls: type) -> ast.FunctionDef | None:
    """Return the definition of the forward of a class, None where there is none or its source is missing."""
    if not hasattr(cls, "forward"):
        return None
    return tree_of(cls.forward)


def walk_tree(tree: ast.AST | None) -> Iterator[ast.AST]:
    """Go through all nodes of a tree, of which there are none where the source is missing."""
    if tree is not None:
        yield from ast.walk(tree)


def calls_in(tree: ast.AST | None) -> list[ast.Call]:
    """Return all calls in a tree."""
    return [node for node in walk_tree(tree) if isinstance(node, ast.Call)]


def names_in(node: ast.AST) -> set[str]:
    """Return all variables that an expression or statement names."""
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _child(node: ast.AST) -> str | None:
    """Return `name` for `self.name` and `self.name[...]`."""
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


@functools.cache
def order_of_use(cls: type) -> dict[str, int]:
    """Return the children of a class by rank of their first use in its forward.

    Those that one `zip` walks together share a rank.
    """
    places: dict[str, Place] = {}
    for call in calls_in(forward_tree(cls)):
        if getattr(call.func, "id", None) == "zip":
            for name in filter(None, map(_child, call.args)):
                _note_first(places, name, call)
    together = set(places)
    for node in walk_tree(forward_tree(cls)):
        if isinstance(node, ast.Attribute):
            name = _child(node)
            if name is not None and name not in together:
                _note_first(places, name, node)
    ranks = {place: rank for rank, place in enumerate(sorted(set(places.values())))}
    return {name: ranks[place] for name, place in places.items()}


def _note_first(places: dict[str, Place], name: str, node: ast.expr) -> None:
    place = (node.lineno, node.col_offset)
    places[name] = min(places.get(name, place), place)


@functools.cache
def calls_of(cls: type, child: str) -> tuple[ast.Call, ...]:
    """Return the calls `self.child(...)` in the forward of a class."""
    return tuple(call for call in calls_in(forward_tree(cls)) if _child(call.func) == child)


@functools.cache
def names_used(cls: type) -> frozenset[str] | None:
    """Return all attributes and texts that the methods of a class name; None where the source of one is missing.

    A child that is not among them is made and never called. `__init__`, which makes it, is left out.
    """
    names: set[str] = set()
    for base in cls.__mro__:
        # torch's modules call their children by loops, and have no names to look for.
        if base.__module__.partition(".")[0] == "torch":
            continue
        for method in filter(inspect.isfunction, vars(base).values()):
            if method.__name__ == "__init__":
                continue
            tree = tree_of(method)
            if tree is None:
                return None
            names.update(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
            # As in getattr(self, "attn2").
            names.update(str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return frozenset(names)


def takes_one_tensor(call: ast.Call) -> bool:
    """Return whether a call gives a single argument, besides the sides `HW` that gated convolutions get."""
    is_single = len(call.args) == 1 and not isinstance(call.args[0], ast.Starred)
    return is_single and {word.arg for word in call.keywords} <= {"HW"}


def passes_another_sequence(cls: type, child: str, forward: Callable) -> bool | None:
    """Return whether a block gives its attention a second sequence; None where that depends, or no call is found."""
    answers = {_has_second_sequence(call, forward) for call in calls_of(cls, child)}
    if True in answers:
        return True
    return False if answers == {False} else None


def _has_second_sequence(call: ast.Call, forward: Callable) -> bool | None:
    names = list(inspect.signature(forward).parameters)
    given = dict(zip(names, call.args, strict=False))
    given |= {word.arg: word.value for word in call.keywords if word.arg}
    second = next(filter(_is_second_sequence, names[1:]), None)
    if second is None:
        return None
    value = given.get(second)
    if value is None or (isinstance(value, ast.Constant) and value.value is None):
        return False
    if isinstance(value, ast.IfExp):
        return None
    # Some blocks pass the same tensor twice.
    return ast.dump(value) != ast.dump(given.get(names[0], value))


def _is_second_sequence(name: str) -> bool:
    return name in ("context", "cond", "gen_seq") or ("encoder" in name and name.endswith("hidden_states"))


@functools.cache
def text_comes_first(processor: type) -> bool | None:
    """Return whether the prompt comes first where a processor joins two streams; None for one that joins none."""
    for call in calls_in(tree_of(processor.__call__)):
        if ast.unparse(call.func) != "torch.cat" or not isinstance(call.args[0], ast.List | ast.Tuple):
            continue
        halves = [_names_text(part) for part in call.args[0].elts]
        if sorted(halves) == [False, True]:
            return halves[0]
    return None


@functools.cache
def is_causal(processor: type) -> bool:
    """Return whether a processor asks for causal attention, whatever it is given."""
    keywords = [word for call in calls_in(tree_of(processor.__call__)) for word in call.keywords]
    return any(ast.unparse(word) == "is_causal=True" for word in keywords)


def _names_text(node: ast.AST) -> bool:
    words = [word for name in names_in(node) for word in name.lower().split("_")]
    return any(word in _TEXT_WORDS for word in words)


@functools.cache
def parameters_of(cls: type) -> tuple[str, ...]:
    """Return the names of what the forward of a class takes, as its source has them."""
    tree = forward_tree(cls)
    if tree is None:
        return ()
    return tuple(word.arg for word in [*tree.args.args[1:], *tree.args.kwonlyargs])


@functools.cache
def returned_names(cls: type) -> frozenset[str | tuple[str, ...]]:
    """Return what the forward of a class returns, as its source has it: a text, or a tuple of texts for several."""
    tree = forward_tree(cls)
    if tree is None:
        return frozenset()
    return frozenset(_unparse(node.value) for node in _returns_in(tree) if node.value is not None)


def _unparse(value: ast.expr) -> str | tuple[str, ...]:
    if isinstance(value, ast.Tuple):
        return tuple(map(ast.unparse, value.elts))
    return ast.unparse(value)


def _returns_in(tree: ast.AST) -> list[ast.Return]:
    """Return the return statements of a function, without those of functions inside it."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Return):
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            found += _returns_in(node)
    return found
