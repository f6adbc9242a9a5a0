"""Generated attention processors: the model's own processor, with its softmax call handed to the graft.

diffusers has some seventy processors that differ in norms, rotary embeddings, text streams and output projections; each
ends in one call of `scaled_dot_product_attention` or `dispatch_attention_fn`. That call is rewritten in the source of the
processor's `__call__`, once per class, and nothing else changes: same signature, same attributes, same instance checks.
"""
from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .errors import GeometryError, OperatorError

# Layouts of the two softmax calls: heads before tokens [B, H, N, E], or after [B, N, H, E].
_SOFTMAX_CALLS = {"scaled_dot_product_attention": "_mix", "dispatch_attention_fn": "_mix_tokens_first"}


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

    def _mix(self, attn, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """`scaled_dot_product_attention`, by the operator: [B, H, N, E] each."""
        if dropout_p:
            raise OperatorError(f"{attn.graft.name} has no attention dropout; the model asks for {dropout_p}.")
        if is_causal and not (attn.graft.honours_causal or attn.graft.causal_operator):
            raise OperatorError(f"{attn.graft.name} looks ahead, and this attention is causal. Leave it as it is.")
        if enable_gqa and key.shape[1] != query.shape[1]:
            shared = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        if attn_mask is not None and not attn.graft.honours_mask:
            refuse_hiding(attn_mask, attn.graft.name)
            attn_mask = None
        context = attn.graft.slot.with_attention(mask=attn_mask, scale=scale, causal=is_causal)
        return attn.graft(query, key, value, context)

    def _mix_tokens_first(self, attn, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                          enable_gqa=False, attention_kwargs=None, *, backend=None, parallel_config=None):  # fmt: skip
        """`dispatch_attention_fn`, by the operator: [B, N, H, E] each. The backend concerns softmax alone."""
        if parallel_config is not None:
            raise OperatorError("A graft mixes tokens on one device: disable context parallelism.")
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return self._mix(attn, *heads_first, attn_mask, dropout_p, is_causal, scale, enable_gqa).transpose(1, 2)

    def __reduce__(self):
        return _dress, (self._original, vars(self).copy())


def refuse_hiding(mask: torch.Tensor, name: str) -> None:
    """Raise `GeometryError` for a mask that hides anything from an operator that cannot honour it."""
    hidden = ~mask if mask.dtype == torch.bool else mask != 0
    if hidden.any():
        raise GeometryError(
            f"{name} cannot honour an attention mask that hides tokens. Pass inputs without padding, "
            "or choose an operator that can, such as linear_attention."
        )


@functools.cache
def grafted_class(original: type) -> type:
    """The generated subclass of a processor class: one per class, so that compiled blocks share one graph."""
    call = _rewritten_call(original) or _intercepted_call(original)
    body = {"__call__": call, "_original": original, "__module__": __name__}
    return type(f"Grafted{original.__name__}", (_Grafted, original), body)


def _rewritten_call(original: type) -> types.FunctionType | None:
    """`original.__call__` with its softmax calls rewritten, or None where there is no source to rewrite."""
    function = inspect.unwrap(original.__call__)
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None
    if function.__closure__:
        return None
    tree = ast.parse(source)
    rewriter = _SoftmaxCalls(*list(inspect.signature(function).parameters)[:2])
    rewriter.visit(tree)
    if not rewriter.found:
        raise OperatorError(
            f"{original.__name__} never calls scaled_dot_product_attention, so there is no softmax to replace. "
            "If set_default_attn_processor() or slicing put it there, go back to the default AttnProcessor2_0."
        )
    tree.body[0].decorator_list = []
    ast.increment_lineno(ast.fix_missing_locations(tree), function.__code__.co_firstlineno - 1)
    module = compile(tree, inspect.getsourcefile(function), "exec", dont_inherit=True)
    code = next(item for item in module.co_consts if isinstance(item, types.CodeType) and item.co_name == function.__name__)
    call = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    call.__kwdefaults__ = function.__kwdefaults__
    call.__signature__ = inspect.signature(function)  # diffusers drops arguments that the signature does not name
    return call


class _SoftmaxCalls(ast.NodeTransformer):
    """Turns `F.scaled_dot_product_attention(...)` into `self._mix(attn, ...)`."""

    def __init__(self, processor: str, attention: str):
        self.processor, self.attention, self.found = processor, attention, 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if called not in _SOFTMAX_CALLS:
            return node
        self.found += 1
        method = ast.Attribute(ast.Name(self.processor, ast.Load()), _SOFTMAX_CALLS[called], ast.Load())
        return ast.copy_location(ast.Call(method, [ast.Name(self.attention, ast.Load()), *node.args], node.keywords), node)


def _intercepted_call(original: type):
    """Eager fallback where source is missing: the original call, its softmax caught on the way to torch."""

    def call(self, attn, *args, **kwargs):
        with _CatchSoftmax(self, attn):
            return original.__call__(self, attn, *args, **kwargs)

    call.__signature__ = inspect.signature(original.__call__)
    return call


class _CatchSoftmax(TorchFunctionMode):
    def __init__(self, processor: _Grafted, attn: nn.Module):
        super().__init__()
        self.processor, self.attn, self.inside = processor, attn, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention or self.inside:
            return func(*args, **(kwargs or {}))
        self.inside = True  # the operator may itself be softmax attention
        try:
            return self.processor._mix(self.attn, *args, **(kwargs or {}))
        finally:
            self.inside = False
