"""The source of attention processors, rewritten so that their core calls the graft; everything else stays theirs.

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

# Local names: the image's hidden states, before a processor joins them with the prompt's, and queries with keys before
# rotary embeddings.
STREAM = "graft_stream"
UNROTATED = "graft_unrotated"

# Layouts of the softmax calls: heads before tokens [B, H, N, E], after [B, N, H, E], or folded into the batch.
_SOFTMAX_CALLS = {
    "scaled_dot_product_attention": "_mix",
    "dispatch_attention_fn": "_mix_tokens_first",
    "mix_scores": "_mix_scores",
}

# Layers of an attention between its input and its core.
_PROJECTIONS = ("to_q", "to_k", "to_v")
_ENTERING = {*_PROJECTIONS, "norm_q", "norm_k"}


def rewrite_call(original: type) -> tuple[types.FunctionType, int] | None:
    """Rewrite the core of `original.__call__`.

    Returns:
        The function and how many cores it has, or None where there is no source to rewrite.

    Raises:
        OperatorError: no core is found.
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
            f"{original.__name__} never calls scaled_dot_product_attention, nor does it mix its queries, keys and "
            "values in one place, so there is no core to replace. Operators that replace the whole attention, such as "
            "mamba2, may go there."
        )
    _remember_unrotated(tree, names, rewriter.inputs)
    tree.decorator_list = []
    tree.body[:0] = ast.parse(f"{STREAM} = {image_stream(names)}\n{UNROTATED} = None").body
    return _compile(tree, function), cores


def image_stream(names: list[str]) -> str:
    """Return the argument that holds the image's tokens, of a processor with these arguments."""
    return "gen_seq" if "gen_seq" in names else names[2]


def _compile(tree: ast.FunctionDef, function: Callable) -> types.FunctionType:
    # Lines keep their numbers, so that tracebacks show the source of diffusers.
    ast.fix_missing_locations(tree)
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    file = inspect.getsourcefile(function) or "<processor>"
    module = compile(ast.Module([tree], []), file, "exec", dont_inherit=True)
    codes = (constant for constant in module.co_consts if isinstance(constant, types.CodeType))
    code = next(code for code in codes if code.co_name == function.__name__)
    call = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    call.__kwdefaults__ = function.__kwdefaults__
    call.__signature__ = inspect.signature(function)  # diffusers drops arguments that the signature does not name
    return call


class _SoftmaxCalls(ast.NodeTransformer):
    """Turns `F.scaled_dot_product_attention(...)` into `self._mix(attn, graft_stream, graft_unrotated, ...)`.

    Attributes:
        found: how many calls were turned.
        inputs: names of queries and keys in them, where those are plain names.
    """

    def __init__(self, processor: str, attention: str):
        self.processor = processor
        self.attention = attention
        self.found = 0
        self.inputs: set[tuple[str, str]] = set()
        # Variables that hold attention scores.
        self.scores: set[str] = set()

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if isinstance(node.value, ast.Call) and self._called(node.value) == "get_attention_scores":
            self.scores.update(target.id for target in node.targets if isinstance(target, ast.Name))
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = self._called(node)
        first = node.args[0] if node.args else None
        if called == "get_attention_scores" and self.scores:
            return self._replace("_scores", [], node)
        if called == "bmm" and isinstance(first, ast.Name) and first.id in self.scores:
            called = "mix_scores"
        if called not in _SOFTMAX_CALLS:
            return node
        self.found += 1
        given = {word.arg: word.value for word in node.keywords}
        query, key = (node.args + [given.get("query"), given.get("key")])[:2]
        if isinstance(query, ast.Name) and isinstance(key, ast.Name):
            self.inputs.add((query.id, key.id))
        return self._replace(_SOFTMAX_CALLS[called], [self.attention, STREAM, UNROTATED], node)

    @staticmethod
    def _called(node: ast.Call) -> str | None:
        if isinstance(node.func, ast.Attribute):
            return node.func.attr
        return getattr(node.func, "id", None)

    def _replace(self, method: str, names: list[str], node: ast.Call) -> ast.AST:
        function = ast.Attribute(ast.Name(self.processor, ast.Load()), method, ast.Load())
        arguments = [ast.Name(name, ast.Load()) for name in names]
        return ast.copy_location(ast.Call(function, [*arguments, *node.args], node.keywords), node)


def _remember_unrotated(tree: ast.FunctionDef, names: list[str], inputs: set[tuple[str, str]]) -> None:
    """Store queries and keys before the first statement that turns them by rotary embeddings.

    Only where one pair of them is already that of a softmax, on one level of the function and assigned before.
    """
    rotary = {name for name in names if "rotary" in name or name in ("freqs_cis", "rope")}
    assigned: set[str] = set()
    for number, statement in enumerate(tree.body):
        read = _names(statement, ast.Load)
        written = _names(statement, ast.Store)
        if read & rotary and any(written.intersection(pair) for pair in inputs):
            # Keys of another softmax, as of an image prompt, come later.
            known = [pair for pair in inputs if assigned.issuperset(pair)]
            if len(known) == 1:
                store = ast.parse(f"{UNROTATED} = ({', '.join(known[0])})").body[0]
                tree.body.insert(number, ast.copy_location(store, statement))
            return
        assigned |= written


def _names(statement: ast.AST, kind: type[ast.expr_context]) -> set[str]:
    """Return the variables that a statement reads, or writes."""
    nodes = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return {node.id for node in nodes if isinstance(node.ctx, kind)}


def _cut_core(tree: ast.FunctionDef, names: list[str]) -> bool:
    """Replace what stands between the projections and `attn.to_out` by one call of `self._mix_projected`.

    Nothing is touched unless projections and norms, each called once, stand together, no other layer is called before
    `to_out`, and the core reads no argument, such as a mask, that ours would not be given.
    """
    processor, attention = names[:2]
    layers = [dict(_layer_calls(statement, attention)) for statement in tree.body]
    end = next((number for number, called in enumerate(layers) if "to_out" in called), 0)
    entering = [number for number, called in enumerate(layers[:end]) if called]
    if not entering or entering != list(range(entering[0], entering[-1] + 1)):
        return False
    if set().union(*layers[:end]) - _ENTERING:
        return False
    found = [_assigned_name(tree.body[:end], layers, name) for name in _PROJECTIONS]
    inputs = [name for name in found if name is not None]
    rotary = [name for name in names if "rotary" in name]
    if len(inputs) < len(found) or len(rotary) > 1:
        return False
    first = entering[-1] + 1
    read = set().union(*(_names(statement, ast.Load) for statement in tree.body[first:end]))
    if read.intersection(names[3:]).difference(rotary):
        return False
    output = ast.unparse(layers[end]["to_out"].args[0])
    arguments = ", ".join([attention, STREAM, UNROTATED, *inputs, *rotary])
    core = ast.parse(f"{output} = {processor}._mix_projected({arguments})").body[0]
    tree.body[first:end] = [ast.copy_location(core, tree.body[end])]
    return True


def _layer_calls(statement: ast.stmt, attention: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield the calls `attn.name(...)` and `attn.name[0](...)` inside a statement, by name."""
    for node in ast.walk(statement):
        if not isinstance(node, ast.Call):
            continue
        layer = node.func.value if isinstance(node.func, ast.Subscript) else node.func
        if isinstance(layer, ast.Attribute) and ast.unparse(layer.value) == attention:
            yield layer.attr, node


def _assigned_name(body: list[ast.stmt], layers: list[dict[str, ast.Call]], name: str) -> str | None:
    """Return the variable that one call of a projection is assigned to; None unless there is one such."""
    found = [statement for statement, called in zip(body, layers, strict=False) if name in called]
    if len(found) != 1 or not isinstance(found[0], ast.Assign) or not isinstance(found[0].targets[0], ast.Name):
        return None
    return found[0].targets[0].id
