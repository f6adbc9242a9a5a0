"""The source of attention processors, rewritten so that their core calls the graft instead; everything else stays
theirs.

The core is a call of softmax attention. Where there is none, as in the linear attention of Sana, it is what stands
between the projections to queries, keys and values and the output projection.
"""

from __future__ import annotations

import ast
import copy
import inspect
import types
from collections.abc import Callable, Iterator

from ..errors import OperatorError
from ..inspection.source import tree_of

# local name of the length of the image's stream, read before a processor joins it with the prompt's
STREAM = "graft_stream"

# Layouts of the softmax calls: heads before tokens [B, H, N, E], after [B, N, H, E], or folded into the batch.
_SOFTMAX_CALLS = {
    "scaled_dot_product_attention": "_mix",
    "dispatch_attention_fn": "_mix_tokens_first",
    "mix_scores": "_mix_scores",
}

# Layers of an attention between its input and its core.
_ENTERING = {"to_q", "to_k", "to_v", "norm_q", "norm_k"}


def rewritten_call(original: type) -> tuple[types.FunctionType, int] | None:
    """`original.__call__` with its core rewritten, and how many calls that has; None where there is no source to
    rewrite.

    Raises `OperatorError` where no core is found.
    """
    function = inspect.unwrap(original.__call__)
    tree = copy.deepcopy(tree_of(function))
    if tree is None or function.__closure__:
        return None
    names = list(inspect.signature(function).parameters)
    rewriter = _SoftmaxCalls(*names[:2])
    rewriter.visit(tree)
    cores = rewriter.found or int(_cut_core(tree, names))
    if not cores:
        raise OperatorError(
            f"{original.__name__} never calls scaled_dot_product_attention, nor does it mix its queries, keys and values in "
            "one place, so there is no core to replace. Operators that replace the whole attention, such as mamba2, may go "
            "there."
        )
    tree.decorator_list = []
    tree.body.insert(0, ast.parse(f"{STREAM} = {image_stream(names)}.shape[-2]").body[0])
    return _compiled(tree, function), cores


def image_stream(names: list[str]) -> str:
    """The argument that holds the image's tokens, of a processor with these arguments."""
    return "gen_seq" if "gen_seq" in names else names[2]


def _compiled(tree: ast.FunctionDef, function: Callable) -> types.FunctionType:
    module = ast.Module(
        [ast.increment_lineno(ast.fix_missing_locations(tree), function.__code__.co_firstlineno - 1)], []
    )
    module = compile(module, inspect.getsourcefile(function), "exec", dont_inherit=True)
    code = next(
        item for item in module.co_consts if isinstance(item, types.CodeType) and item.co_name == function.__name__
    )
    call = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    call.__kwdefaults__ = function.__kwdefaults__
    call.__signature__ = inspect.signature(function)  # diffusers drops arguments that the signature does not name
    return call


class _SoftmaxCalls(ast.NodeTransformer):
    """Turns `F.scaled_dot_product_attention(...)` into `self._mix(attn, graft_stream, ...)`."""

    def __init__(self, processor: str, attention: str):
        self.processor, self.attention, self.found, self.scores = processor, attention, 0, set()

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if isinstance(node.value, ast.Call) and self._called(node.value) == "get_attention_scores":
            self.scores |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called, first = self._called(node), node.args[0] if node.args else None
        if called == "get_attention_scores" and self.scores:
            return self._ours("_scores", [], node)
        if called == "bmm" and isinstance(first, ast.Name) and first.id in self.scores:
            called = "mix_scores"
        if called not in _SOFTMAX_CALLS:
            return node
        self.found += 1
        return self._ours(_SOFTMAX_CALLS[called], [self.attention, STREAM], node)

    @staticmethod
    def _called(node: ast.Call) -> str | None:
        return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)

    def _ours(self, method: str, names: list[str], node: ast.Call) -> ast.AST:
        function = ast.Attribute(ast.Name(self.processor, ast.Load()), method, ast.Load())
        arguments = [ast.Name(name, ast.Load()) for name in names]
        return ast.copy_location(ast.Call(function, [*arguments, *node.args], node.keywords), node)


def _cut_core(tree: ast.FunctionDef, names: list[str]) -> bool:
    """Put `out = self._mix_projected(attn, graft_stream, query, key, value, rotary)` between projections and
    `attn.to_out`.

    Nothing is touched unless projections and norms, each called once, stand together, no other layer is called before
    `to_out`, and the core reads no argument, such as a mask, that ours would not be given.
    """
    processor, attention = names[:2]
    called = [dict(_layers(statement, attention)) for statement in tree.body]
    leaving = next((number for number, layers in enumerate(called) if "to_out" in layers), 0)
    entering = [number for number, layers in enumerate(called[:leaving]) if layers]
    together = bool(entering) and entering == list(range(entering[0], entering[-1] + 1))
    parts = [_assigned(tree.body[:leaving], called, name) for name in ("to_q", "to_k", "to_v")]
    rotary, strange = [name for name in names if "rotary" in name], set().union(*called[:leaving]) - _ENTERING
    if not together or strange or None in parts or len(rotary) > 1:
        return False
    core = ast.Module(tree.body[entering[-1] + 1 : leaving], [])
    read = {node.id for node in ast.walk(core) if isinstance(node, ast.Name)}
    if read.intersection(names[3:]) - {*rotary}:
        return False
    out = ast.unparse(called[leaving]["to_out"].args[0])
    ours = ast.parse(f"{out} = {processor}._mix_projected({', '.join([attention, STREAM, *parts, *rotary])})").body
    tree.body[entering[-1] + 1 : leaving] = [ast.copy_location(ours[0], tree.body[leaving])]
    return True


def _layers(statement: ast.stmt, attention: str) -> Iterator[tuple[str, ast.Call]]:
    """Calls `attn.name(...)` and `attn.name[0](...)` inside a statement, by name."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call):
            layer = node.func.value if isinstance(node.func, ast.Subscript) else node.func
            if isinstance(layer, ast.Attribute) and ast.unparse(layer.value) == attention:
                yield layer.attr, node


def _assigned(body: list[ast.stmt], called: list[dict[str, ast.Call]], name: str) -> str | None:
    """The variable that one call of a projection is assigned to; None unless there is one such."""
    found = [statement for statement, layers in zip(body, called, strict=False) if name in layers]
    plain = len(found) == 1 and isinstance(found[0], ast.Assign) and isinstance(found[0].targets[0], ast.Name)
    return found[0].targets[0].id if plain else None
