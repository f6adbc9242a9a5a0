"""What classes say in their source, read without running them: which children a forward calls, in which order, with
what.

A model on the meta device, or one of 57 blocks, is read as fast as a tiny one: every answer belongs to a class, and is
kept.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable

# Words that mark the prompt's half where a processor joins two streams: [encoder_query, query], [img_key, txt_key],
# [k_i, k_t].
_TEXT_WORDS = ("encoder", "txt", "text", "und", "t")


@functools.cache
def tree_of(function: Callable) -> ast.FunctionDef | None:
    """The definition of a function or method, or None where its source is missing."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


def _forward(cls: type) -> ast.AST:
    tree = tree_of(cls.forward) if hasattr(cls, "forward") else None
    return ast.Module([], []) if tree is None else tree


def _child(node: ast.AST) -> str | None:
    """`name` of `self.name` or `self.name[...]`."""
    node = node.value if isinstance(node, ast.Subscript) else node
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own else None


@functools.cache
def order_of_use(cls: type) -> dict[str, int]:
    """Children by rank of their first use in the forward of a class; those that one `zip` walks together share a rank."""
    places: dict[str, tuple[int, int]] = {}
    for node in ast.walk(_forward(cls)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "zip":
            for name in filter(None, map(_child, node.args)):
                places[name] = min(places.get(name, (node.lineno, node.col_offset)), (node.lineno, node.col_offset))
    together = set(places)
    for node in ast.walk(_forward(cls)):
        name = _child(node) if isinstance(node, ast.Attribute) else None
        if name is not None and name not in together:
            places[name] = min(places.get(name, (node.lineno, node.col_offset)), (node.lineno, node.col_offset))
    ranks = {place: rank for rank, place in enumerate(sorted(set(places.values())))}
    return {name: ranks[place] for name, place in places.items()}


@functools.cache
def calls_of(cls: type, child: str) -> tuple[ast.Call, ...]:
    """The calls `self.child(...)` in the forward of a class."""
    calls = (node for node in ast.walk(_forward(cls)) if isinstance(node, ast.Call))
    return tuple(call for call in calls if _child(call.func) == child)


def takes_one_tensor(call: ast.Call) -> bool:
    """Whether a call gives a single argument (gated convolutions are told the sides, `HW`, too)."""
    single = len(call.args) == 1 and not isinstance(call.args[0], ast.Starred)
    return single and {word.arg for word in call.keywords} <= {"HW"}


def passes_another_sequence(cls: type, child: str, forward: Callable) -> bool | None:
    """Whether a block gives its attention a second sequence; None where that depends, or where no call is found."""
    answers = {_second_argument(call, forward) for call in calls_of(cls, child)}
    if True in answers:
        return True
    return False if answers == {False} else None


def _second_argument(call: ast.Call, forward: Callable) -> bool | None:
    names = list(inspect.signature(forward).parameters)
    given = dict(zip(names, call.args, strict=False)) | {word.arg: word.value for word in call.keywords if word.arg}
    second = next(filter(_is_second_sequence, names[1:]), None)
    if second is None:
        return None
    if second not in given or (isinstance(given[second], ast.Constant) and given[second].value is None):
        return False
    if isinstance(given[second], ast.IfExp):
        return None
    return ast.dump(given[second]) != ast.dump(given.get(names[0], given[second]))


def _is_second_sequence(name: str) -> bool:
    return name in ("context", "cond", "gen_seq") or ("encoder" in name and name.endswith("hidden_states"))


@functools.cache
def text_comes_first(processor: type) -> bool | None:
    """Where the prompt stands in the sequence a processor joins from two streams; None for one that joins none."""
    tree = tree_of(processor.__call__)
    for node in ast.walk(tree) if tree is not None else ():
        joins = isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.cat"
        if joins and isinstance(node.args[0], ast.List | ast.Tuple):
            halves = [_speaks_of_text(part) for part in node.args[0].elts]
            if sorted(halves) == [False, True]:
                return halves[0]
    return None


@functools.cache
def is_causal(processor: type) -> bool:
    """Whether a processor asks for causal attention, whatever it is given."""
    tree = tree_of(processor.__call__)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree is not None else []
    return any(ast.unparse(word) == "is_causal=True" for call in calls for word in call.keywords)


def _speaks_of_text(node: ast.AST) -> bool:
    names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return any(word in _TEXT_WORDS for name in names for word in name.lower().split("_"))


@functools.cache
def parameters_of(cls: type) -> tuple[str, ...]:
    """Names of what the forward of a class takes, as its source has them."""
    tree = tree_of(cls.forward) if hasattr(cls, "forward") else None
    return () if tree is None else tuple(word.arg for word in [*tree.args.args[1:], *tree.args.kwonlyargs])


@functools.cache
def returned_names(cls: type) -> frozenset[str | tuple[str, ...]]:
    """What the forward of a class returns: a text for one value, a tuple of names for several, each as its source has
    it.
    """
    tree = tree_of(cls.forward) if hasattr(cls, "forward") else None
    return (
        frozenset(_names(node.value) for node in _own_returns(tree) if node.value is not None) if tree else frozenset()
    )


def _names(value: ast.AST) -> str | tuple[str, ...]:
    return tuple(map(ast.unparse, value.elts)) if isinstance(value, ast.Tuple) else ast.unparse(value)


def _own_returns(tree: ast.AST) -> list[ast.Return]:
    """The return statements of a function, without those of functions inside it."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Return):
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            found += _own_returns(node)
    return found
