"""Generated attention processors: the model's own processor, with its softmax call handed to the graft.

diffusers has some seventy processors that differ in norms, rotary embeddings, text streams and output projections; each
ends in one call of `scaled_dot_product_attention` or `dispatch_attention_fn`. That call is rewritten in the source of the
processor's `__call__`, once per class, and nothing else changes: same signature, same attributes, same instance checks.
"""
from __future__ import annotations

import ast
import copy
import functools
import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode

from .errors import OperatorError
from .mixing import mix, mix_with_others
from .site import Context, Site
from .source import text_comes_first, tree_of

# Layouts of the two softmax calls: heads before tokens [B, H, N, E], or after [B, N, H, E].
_SOFTMAX_CALLS = {
    "scaled_dot_product_attention": "_mix", "dispatch_attention_fn": "_mix_tokens_first", "mix_scores": "_mix_scores",
}  # fmt: skip

_STREAM = "graft_stream"  # local name of the length of the image's stream, read before a processor joins it with the prompt's


def graft_processor(processor: Any) -> Any:
    """A processor that acts as `processor` but calls `attn.graft` in place of softmax attention. Stateless.

    Raises `OperatorError` for processors whose softmax cannot be reached.
    """
    if isinstance(processor, nn.Module):
        raise OperatorError(
            f"{type(processor).__name__} holds weights of its own, which a generated processor would not carry. "
            "Unload what installed it (an IP-Adapter, say), then graft."
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise OperatorError("A graft mixes tokens on one device: disable context parallelism before grafting.")
    return _dress(type(processor), vars(processor))


def is_grafted(processor: Any) -> bool:
    """Whether a processor is one of ours."""
    return isinstance(processor, _Grafted)


def _dress(original: type, state: dict[str, Any]) -> Any:
    cls = grafted_class(original)
    processor = cls.__new__(cls)
    vars(processor).update(state)
    return processor


class _Grafted:
    """What every generated class adds to the processor class it derives from."""

    _original: type
    _text_first: bool | None
    _calls: int

    def _mix(self, attn, stream, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
             enable_gqa=False):  # fmt: skip
        """`scaled_dot_product_attention`, by the operator: [B, H, N, E] each; `stream` is the length of the image's stream."""
        operator, site = attn.graft, attn.graft_site
        if dropout_p:
            raise OperatorError(f"{operator.name} has no attention dropout; the model asks for {dropout_p}.")
        if isinstance(attn_mask, BlockMask):
            raise OperatorError(f"{site.path} runs under a flex BlockMask, which no mixer can honour. Leave it as it is.")
        if enable_gqa and key.shape[1] != query.shape[1]:
            shared = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        tokens, keys = query.shape[2], key.shape[2]
        context = operator.slot.with_attention(mask=attn_mask, scale=scale, causal=is_causal).at(site, tokens)
        image = self._image_tokens(site, context, stream, tokens, keys)
        if image is None or operator.honours_mask and operator.honours_causal:
            return mix(operator, query, key, value, context)
        first = self._text_first if site.kind == "joint_attention" else context.text_first
        start = keys - image if first else 0
        own = context.grid.tokens if context.grid is not None and context.text_first is not None else image
        if own < image:  # the stream also holds earlier frames, before the image, or padding, after it
            start, image = start + (image - own) * context.text_first, own
        return mix_with_others(operator, query, key, value, context, start=start, image=image)

    def _image_tokens(self, site: Site, context: Context, stream: int, tokens: int, keys: int) -> int | None:
        """How many of the keys belong to the image; None where a mixer takes the whole sequence."""
        if site.kind == "cross_attention":
            return None
        image = stream if site.kind == "joint_attention" else None
        if site.kind == "self_attention" and context.grid is not None and context.text_first is not None:
            shared = keys > context.grid.tokens or (self._calls > 1 and tokens < context.grid.tokens)
            image = context.grid.tokens if shared else None
        if tokens != keys and (image is None or tokens > image):
            raise OperatorError(
                f"{site.path} attends to keys of other tokens than its own, as with a key-value cache, and "
                "a graft mixes the tokens of one forward. Run the model without its cache."
            )
        return image

    def _mix_tokens_first(self, attn, stream, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                          enable_gqa=False, attention_kwargs=None, *, backend=None, parallel_config=None):  # fmt: skip
        """`dispatch_attention_fn`, by the operator: [B, N, H, E] each. The backend concerns softmax alone."""
        if parallel_config is not None:
            raise OperatorError("A graft mixes tokens on one device: disable context parallelism.")
        if isinstance(attn_mask, torch.Tensor) and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return self._mix(attn, stream, *heads_first, attn_mask, dropout_p, is_causal, scale, enable_gqa).transpose(1, 2)

    def _scores(self, query, key, attn_mask=None):
        """`attn.get_attention_scores`: put off until the values are there."""
        return query, key, attn_mask

    def _mix_scores(self, attn, stream, scores, value):
        """`torch.bmm(scores, value)`, by the operator: [B * H, N, E] each, as the oldest processors have them."""
        query, key, mask = scores
        query, key, value = (tensor.unflatten(0, (-1, attn.heads)) for tensor in (query, key, value))
        mask = mask if mask is None else mask.unflatten(0, (-1, attn.heads))
        return self._mix(attn, stream, query, key, value, mask, scale=attn.scale).flatten(0, 1)

    def __reduce__(self):
        return _dress, (self._original, vars(self).copy())


@functools.cache
def grafted_class(original: type) -> type:
    """The generated subclass of a processor class: one per class, so that compiled blocks share one graph."""
    call, count = _rewritten_call(original) or (_intercepted_call(original), 1)
    body = {"__call__": call, "_original": original, "_text_first": text_comes_first(original), "_calls": count,
            "__module__": __name__}  # fmt: skip
    return type(f"Grafted{original.__name__}", (_Grafted, original), body)


def _rewritten_call(original: type) -> tuple[types.FunctionType, int] | None:
    """`original.__call__` with its softmax calls rewritten, and their number; None where there is no source to rewrite."""
    function = inspect.unwrap(original.__call__)
    tree = copy.deepcopy(tree_of(function))
    if tree is None or function.__closure__:
        return None
    names = list(inspect.signature(function).parameters)
    rewriter = _SoftmaxCalls(*names[:2])
    rewriter.visit(tree)
    if not rewriter.found:
        raise OperatorError(
            f"{original.__name__} never calls scaled_dot_product_attention, so there is no softmax to replace. "
            "Operators that replace the whole attention, such as mamba2, may go there."
        )
    tree.decorator_list = []
    tree.body.insert(0, ast.parse(f"{_STREAM} = {_image_stream(names)}.shape[-2]").body[0])
    module = ast.Module([ast.increment_lineno(ast.fix_missing_locations(tree), function.__code__.co_firstlineno - 1)], [])
    module = compile(module, inspect.getsourcefile(function), "exec", dont_inherit=True)
    code = next(item for item in module.co_consts if isinstance(item, types.CodeType) and item.co_name == function.__name__)
    call = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    call.__kwdefaults__ = function.__kwdefaults__
    call.__signature__ = inspect.signature(function)  # diffusers drops arguments that the signature does not name
    return call, rewriter.found


def _image_stream(names: list[str]) -> str:
    """The argument that holds the image's tokens, of a processor with these arguments."""
    return "gen_seq" if "gen_seq" in names else names[2]


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
        return self._ours(_SOFTMAX_CALLS[called], [self.attention, _STREAM], node)

    @staticmethod
    def _called(node: ast.Call) -> str | None:
        return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)

    def _ours(self, method: str, names: list[str], node: ast.Call) -> ast.AST:
        function = ast.Attribute(ast.Name(self.processor, ast.Load()), method, ast.Load())
        arguments = [ast.Name(name, ast.Load()) for name in names]
        return ast.copy_location(ast.Call(function, [*arguments, *node.args], node.keywords), node)


def _intercepted_call(original: type):
    """Eager fallback where source is missing: the original call, its softmax caught on the way to torch."""
    signature = inspect.signature(original.__call__)
    stream = _image_stream(list(signature.parameters))

    def call(self, attn, *args, **kwargs):
        given = signature.bind(self, attn, *args, **kwargs).arguments
        with _CatchSoftmax(self, attn, given[stream].shape[-2]):
            return original.__call__(self, attn, *args, **kwargs)

    call.__signature__ = signature
    return call


class _CatchSoftmax(TorchFunctionMode):
    def __init__(self, processor: _Grafted, attn: nn.Module, stream: int):
        super().__init__()
        self.processor, self.attn, self.stream, self.inside = processor, attn, stream, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention or self.inside:
            return func(*args, **(kwargs or {}))
        self.inside = True  # the operator may itself be softmax attention
        try:
            return self.processor._mix(self.attn, self.stream, *args, **(kwargs or {}))
        finally:
            self.inside = False
