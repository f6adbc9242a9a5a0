"""Generated attention processors: the model's own processor, with its softmax call handed to the graft.

diffusers has some seventy processors that differ in norms, rotary embeddings, text streams and output projections;
nearly each ends in one call of `scaled_dot_product_attention` or `dispatch_attention_fn`. That call, or the core of an
attention that is linear already, is rewritten in the source of the processor's `__call__` (`rewriting`), once per
class, and nothing else
changes: same signature, same attributes, same instance checks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode

from ..core.context import Context
from ..core.sites import Site
from ..errors import OperatorError
from ..inspection.source import text_comes_first
from .attention_core import mix, mix_with_others
from .processor_source import image_stream, rewritten_call


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
    return _make_processor(type(processor), vars(processor))


def is_grafted(processor: Any) -> bool:
    """Whether a processor is one of ours."""
    return isinstance(processor, _Grafted)


def _make_processor(original: type, state: dict[str, Any]) -> Any:
    """A processor of the class generated for `original`, with the attributes that its own had."""
    cls = grafted_class(original)
    processor = cls.__new__(cls)
    vars(processor).update(state)
    return processor


class _Grafted:
    """What every generated class adds to the processor class it derives from."""

    _original: type
    _text_first: bool | None
    _calls: int

    def _mix(
        self,
        attn,
        stream,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
        softmax=None,
    ):
        """`scaled_dot_product_attention`, by the operator: [B, H, N, E] each; `stream` is the length of the image's
        stream.
        """
        operator, site = attn.graft, attn.graft_site
        if dropout_p:
            raise OperatorError(f"{operator.name} has no attention dropout; the model asks for {dropout_p}.")
        if isinstance(attn_mask, BlockMask):
            raise OperatorError(
                f"{site.path} runs under a flex BlockMask, which no mixer can honour. Leave it as it is."
            )
        if enable_gqa and key.shape[1] != query.shape[1]:
            shared = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        tokens, keys = query.shape[2], key.shape[2]
        if attn_mask is not None and attn_mask.dim() and attn_mask.shape[-1] == 1:
            attn_mask = attn_mask.expand(*attn_mask.shape[:-1], keys)  # one for all keys
        context = operator.slot.with_attention(mask=attn_mask, scale=scale, causal=is_causal, softmax=softmax).at(
            site, tokens
        )
        image = self._image_tokens(site, context, stream, tokens, keys)
        if image is None or operator.is_plain_softmax:
            return mix(operator, query, key, value, context)
        first = self._text_first if site.kind == "joint_attention" else context.text_first
        start = keys - image if first else 0
        if site.kind == "self_attention" and first:
            start -= context.references
        has_others = context.text_first is not None or context.references > 0
        if context.grid is not None and has_others and context.grid.tokens < image:
            # The stream also holds earlier frames, before the image, or reference images and padding, behind it.
            if context.text_first:
                start += image - context.grid.tokens - context.references
            image = context.grid.tokens
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

    def _mix_tokens_first(
        self,
        attn,
        stream,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
        attention_kwargs=None,
        *,
        backend=None,
        parallel_config=None,
    ):
        """`dispatch_attention_fn`, by the operator: [B, N, H, E] each. Its backend is for operators that use softmax."""
        if parallel_config is not None:
            raise OperatorError("A graft mixes tokens on one device: disable context parallelism.")
        if isinstance(attn_mask, torch.Tensor) and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        softmax = _softmax_by(backend)
        mixed = self._mix(attn, stream, *heads_first, attn_mask, dropout_p, is_causal, scale, enable_gqa, softmax)
        return mixed.transpose(1, 2)

    def _scores(self, query, key, attn_mask=None):
        """`attn.get_attention_scores`: put off until the values are there."""
        return query, key, attn_mask

    def _mix_scores(self, attn, stream, scores, value):
        """`torch.bmm(scores, value)`, by the operator: [B * H, N, E] each, as the oldest processors have them."""
        query, key, mask = scores
        query, key, value = (tensor.unflatten(0, (-1, attn.heads)) for tensor in (query, key, value))
        mask = mask if mask is None else mask.unflatten(0, (-1, attn.heads))
        return self._mix(attn, stream, query, key, value, mask, scale=attn.scale).flatten(0, 1)

    def _mix_projected(self, attn, stream, query, key, value, rotary=None):
        """What stands between the projections and the output projection, by the operator: [B, N, H * E] each."""
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        if rotary is not None:
            query, key = (_rotated(tensor, *rotary) for tensor in (query, key))
        return self._mix_tokens_first(attn, stream, query, key, value).flatten(2)

    def __reduce__(self):
        return _make_processor, (self._original, vars(self).copy())


def _softmax_by(backend: AttentionBackendName | None) -> Callable[..., torch.Tensor] | None:
    """Softmax attention on [B, H, N, E] by one of diffusers' backends; None where that is torch's own."""
    if backend is None:
        # Set for all models at once: by the environment, or by the context manager `attention_backend`.
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    if backend == AttentionBackendName.NATIVE:
        return None
    return functools.partial(_dispatch_heads_first, backend)


def _dispatch_heads_first(backend, query, key, value, *, attn_mask, scale, is_causal):
    tokens_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mixed = dispatch_attention_fn(
        *tokens_first, attn_mask=attn_mask, scale=scale, is_causal=is_causal, backend=backend
    )
    return mixed.transpose(1, 2)


def _rotated(tensor: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """[B, N, H, E], neighbouring features turned as pairs; cosines and sines [1, N, 1, E], each given twice."""
    first, second = tensor.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack([-second, first], dim=-1).flatten(-2)
    return (tensor * cosines + quarter_turn * sines).to(tensor.dtype)


@functools.cache
def grafted_class(original: type) -> type:
    """The generated subclass of a processor class: one per class, so that compiled blocks share one graph."""
    call, count = rewritten_call(original) or (_intercepted_call(original), 1)
    body = {
        "__call__": call,
        "_original": original,
        "_text_first": text_comes_first(original),
        "_calls": count,
        "__module__": __name__,
    }
    return type(f"Grafted{original.__name__}", (_Grafted, original), body)


def _intercepted_call(original: type):
    """Eager fallback where source is missing: the original call, its softmax caught on the way to torch."""
    signature = inspect.signature(original.__call__)
    stream = image_stream(list(signature.parameters))

    def call(self, attn, *args, **kwargs):
        given = signature.bind(self, attn, *args, **kwargs).arguments
        with _CatchSoftmax(self, attn, given[stream].shape[-2]) as softmax:
            output = original.__call__(self, attn, *args, **kwargs)
        if not softmax.caught:
            raise OperatorError(
                f"{original.__name__} has no source to read, and never called scaled_dot_product_attention: "
                f"{attn.graft_site.path} ran as without a graft. Set another processor, then graft."
            )
        return output

    call.__signature__ = signature
    return call


class _CatchSoftmax(TorchFunctionMode):
    def __init__(self, processor: _Grafted, attn: nn.Module, stream: int):
        super().__init__()
        self.processor, self.attn, self.stream, self.inside, self.caught = processor, attn, stream, False, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention or self.inside:
            return func(*args, **(kwargs or {}))
        self.inside = self.caught = True  # the operator may itself be softmax attention
        try:
            return self.processor._mix(self.attn, self.stream, *args, **(kwargs or {}))
        finally:
            self.inside = False
