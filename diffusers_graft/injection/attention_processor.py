"""Generated attention processors: the model's own processor, with its softmax call handed to the graft.

diffusers has some seventy processors that differ in norms, rotary embeddings, text streams and output projections;
nearly each ends in one call of `scaled_dot_product_attention` or `dispatch_attention_fn`. That call, or the core of an
attention that is linear already, is rewritten in the source of the processor's `__call__` (`processor_source`), once
per class, and nothing else changes: same signature, same attributes, same instance checks.
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
from ..operators import Mixer
from .attention_core import mix, mix_with_others
from .hooks import register_processor
from .processor_source import image_stream, rewrite_call

# Queries and keys as they were before rotary embeddings.
Unrotated = tuple[torch.Tensor, torch.Tensor] | None


def graft_processor(processor: Any) -> Any:
    """Make a processor that acts as `processor` but calls `attn.graft` in place of softmax attention.

    Raises `OperatorError` for processors whose softmax cannot be reached.
    """
    # diffusers saves the parameters of processors, and drops them when it loads.
    if isinstance(processor, nn.Module):
        raise OperatorError(
            f"{type(processor).__name__} has weights, which a generated processor would not carry. "
            "Unload what installed it (an IP-Adapter, say), then graft."
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise OperatorError("A graft mixes tokens on one device: disable context parallelism before grafting.")
    return _make_processor(type(processor), vars(processor))


def is_grafted(processor: Any) -> bool:
    """Return whether a processor is one of ours."""
    return isinstance(processor, _Grafted)


def _make_processor(original: type, state: dict[str, Any]) -> Any:
    """Make a processor of the class generated for `original`, with the same attributes."""
    cls = grafted_class(original)
    processor = object.__new__(cls)
    vars(processor).update(state)
    return processor


class _Grafted:
    """The part of every generated class that is not the processor class it derives from. It holds no state."""

    _original: type
    _text_first: bool | None
    _calls: int

    def _mix(
        self,
        attn: Any,  # an attention of diffusers, of any class, with the attributes of a seat
        stream: torch.Tensor,
        unrotated: Unrotated,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        softmax: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run the operator in place of `scaled_dot_product_attention`: [B, H, N, E] each.

        `stream` are the hidden states of the image, as the processor was given them.
        """
        operator: Mixer = attn.graft
        site: Site = attn.graft_site
        if dropout_p:
            raise OperatorError(f"{operator.name} has no attention dropout; the model asks for {dropout_p}.")
        if isinstance(attn_mask, BlockMask):
            raise OperatorError(
                f"{site.path} runs under a flex BlockMask, which no mixer can honour. Leave it as it is."
            )
        if enable_gqa:
            # Operators have one key for each query head.
            shared = query.shape[1] // key.shape[1]
            key = _repeat_heads(key, shared)
            value = _repeat_heads(value, shared)
            unrotated = unrotated and (unrotated[0], _repeat_heads(unrotated[1], shared))
        tokens = query.shape[2]
        keys = key.shape[2]
        if attn_mask is not None and attn_mask.dim() and attn_mask.shape[-1] == 1:
            # One value for all keys.
            attn_mask = attn_mask.expand(*attn_mask.shape[:-1], keys)
        context = operator.slot.with_attention(mask=attn_mask, scale=scale, causal=is_causal, softmax=softmax)
        context = context.at(site, tokens)
        image = self._image_tokens(site, context, stream.shape[-2], tokens, keys)
        mixed_tokens = tokens
        if image is not None and not operator.is_plain_softmax:
            mixed_tokens = image
        context = _with_more(context, operator, site, stream, unrotated, query, key, mixed_tokens)
        if image is None or operator.is_plain_softmax:
            return mix(operator, query, key, value, context)
        # The processor itself joins text and image of joint attention; elsewhere the model does.
        is_joint = site.kind == "joint_attention"
        text_first = self._text_first if is_joint else context.text_first
        start = keys - image if text_first else 0
        if text_first and not is_joint:
            start -= context.references
        has_others = context.text_first is not None or context.references > 0
        if context.grid is not None and has_others and context.grid.tokens < image:
            # The stream also holds earlier frames, before the image, or reference images and padding, behind it.
            if context.text_first:
                start += image - context.grid.tokens - context.references
            image = context.grid.tokens
        return mix_with_others(operator, query, key, value, context, start=start, image=image)

    def _image_tokens(self, site: Site, context: Context, stream: int, tokens: int, keys: int) -> int | None:
        """Return how many of the keys belong to the image; None where a mixer takes the complete sequence."""
        if site.kind == "cross_attention":
            return None
        image = None
        if site.kind == "joint_attention":
            image = stream
        elif context.grid is not None and context.text_first is not None:
            # Processors that mix sequences piece by piece, such as one sample after the other, have more calls.
            in_pieces = self._calls > 1 and tokens < context.grid.tokens
            if keys > context.grid.tokens or in_pieces:
                image = context.grid.tokens
        if tokens != keys and (image is None or tokens > image):
            raise OperatorError(
                f"{site.path} attends to keys of other tokens than its queries, as with a key-value cache, and "
                "a graft mixes the tokens of one forward. Run the model without its cache."
            )
        return image

    def _mix_tokens_first(
        self,
        attn: nn.Module,
        stream: torch.Tensor,
        unrotated: Unrotated,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: AttentionBackendName | None = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        """Run the operator in place of `dispatch_attention_fn`: [B, N, H, E] each.

        The backend is for operators that use softmax.
        """
        if parallel_config is not None:
            raise OperatorError("A graft mixes tokens on one device: disable context parallelism.")
        # Some backends take masks [B, M] of keys.
        if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]
        if unrotated is not None:
            # Some processors turn them before they split the heads.
            unrotated_query = _split_heads(unrotated[0], query.shape[2])
            unrotated_key = _split_heads(unrotated[1], key.shape[2])
            unrotated = (unrotated_query.transpose(1, 2), unrotated_key.transpose(1, 2))
        mixed = self._mix(
            attn,
            stream,
            unrotated,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            _softmax_by(backend),
        )
        return mixed.transpose(1, 2)

    def _scores(self, query, key, attn_mask=None):
        """Put off `attn.get_attention_scores` until the values are there."""
        return query, key, attn_mask

    def _mix_scores(self, attn, stream, unrotated, scores, value):
        """Run the operator in place of `torch.bmm(scores, value)`, as the oldest processors have it.

        [B * H, N, E] each.
        """
        query, key, mask = scores
        query, key, value = (tensor.unflatten(0, (-1, attn.heads)) for tensor in (query, key, value))
        if mask is not None:
            mask = mask.unflatten(0, (-1, attn.heads))
        return self._mix(attn, stream, unrotated, query, key, value, mask, scale=attn.scale).flatten(0, 1)

    def _mix_projected(self, attn, stream, unrotated, query, key, value, rotary=None):
        """Run the operator in place of all between the projections and the output projection: [B, N, H * E] each."""
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        if rotary is not None:
            unrotated = (query, key)
            query = _rotate(query, *rotary)
            key = _rotate(key, *rotary)
        return self._mix_tokens_first(attn, stream, unrotated, query, key, value).flatten(2)

    def __reduce__(self):
        return _make_processor, (self._original, vars(self).copy())


def _repeat_heads(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Return [B, H, N, E] with each head so many times in turn."""
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=1)


def _split_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return [B, N, H, E] of that or of [B, N, D]."""
    return tensor.unflatten(2, (heads, -1)) if tensor.dim() == 3 else tensor


def _with_more(
    context: Context,
    operator: Mixer,
    site: Site,
    stream: torch.Tensor,
    unrotated: Unrotated,
    query: torch.Tensor,
    key: torch.Tensor,
    mixed_tokens: int,
) -> Context:
    """Add to a context what an operator declares that it needs besides queries, keys and values.

    Args:
        query, key: of the whole attention, [B, H, N, E].
        mixed_tokens: of the image alone, where the operator mixes no others.

    Raises `OperatorError` where this processor cannot give it.
    """
    batch, heads, tokens, width = query.shape
    if operator.needs_hidden_states:
        # The stream holds the whole sequence, or the image alone where the processor joins the prompt to it.
        if stream.dim() != 3 or stream.shape[0] != batch or stream.shape[1] not in (tokens, mixed_tokens):
            raise OperatorError(
                f"{operator.name} needs the hidden states of all tokens it mixes, and {site.path} mixes {tokens} "
                f"tokens of {batch} samples, with hidden states of shape {tuple(stream.shape)} for them. Choose "
                "another mixer there."
            )
        context = context.changed(hidden_states=stream)
    if operator.before_rotary:
        shapes = [(batch, heads, length, width) for length in (tokens, mixed_tokens)]
        if unrotated is None or any(tuple(part.shape) not in shapes for part in unrotated):
            raise OperatorError(
                f"{operator.name} needs queries and keys before rotary embeddings, and those of {site.path} "
                "cannot be read from its source. Choose another mixer there."
            )
        # Compiled code cannot branch on values.
        if not (torch.compiler.is_compiling() or query.is_meta) and unrotated[0].shape == query.shape:
            operator.require_rotary(unrotated, (query, key))
        context = context.changed(unrotated=unrotated)
    return context


def _softmax_by(backend: AttentionBackendName | str | None) -> Callable[..., torch.Tensor] | None:
    """Return softmax attention on [B, H, N, E] by one of diffusers' backends; None where that is torch's own."""
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


def _rotate(tensor: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring features of [B, N, H, E] as pairs; cosines and sines [1, N, 1, E], each given twice."""
    first, second = tensor.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack([-second, first], dim=-1).flatten(-2)
    return (tensor * cosines + quarter_turn * sines).to(tensor.dtype)


@functools.cache
def grafted_class(original: type) -> type:
    """Generate the subclass of a processor class: one per class, so that compiled blocks share one graph."""
    rewritten = rewrite_call(original)
    if rewritten is None:
        call = _intercept_call(original)
        count = 1
    else:
        call, count = rewritten
    body = {
        "__call__": call,
        "_original": original,
        "_text_first": text_comes_first(original),
        "_calls": count,
        "__module__": __name__,
    }
    cls = type(f"Grafted{original.__name__}", (_Grafted, original), body)
    register_processor(cls, original)
    return cls


def _intercept_call(original: type) -> Callable[..., Any]:
    """Make an eager fallback where source is missing: the original call, its softmax caught on the way to torch."""
    signature = inspect.signature(original.__call__)
    stream = image_stream(list(signature.parameters))

    def call(self, attn, *args, **kwargs):
        arguments = signature.bind(self, attn, *args, **kwargs).arguments
        with _CatchSoftmax(self, attn, arguments[stream]) as softmax:
            output = original.__call__(self, attn, *args, **kwargs)
        if not softmax.was_called:
            raise OperatorError(
                f"{original.__name__} has no source to read, and never called scaled_dot_product_attention: "
                f"{attn.graft_site.path} ran as without a graft. Set another processor, then graft."
            )
        return output

    call.__signature__ = signature
    return call


class _CatchSoftmax(TorchFunctionMode):
    """Hands calls of torch's softmax attention to the graft."""

    def __init__(self, processor: _Grafted, attn: nn.Module, stream: torch.Tensor):
        super().__init__()
        self.processor = processor
        self.attn = attn
        self.stream = stream
        self.is_inside = False
        self.was_called = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.is_inside:
            return func(*args, **kwargs)
        # The operator may itself be softmax attention.
        self.is_inside = True
        self.was_called = True
        try:
            return self.processor._mix(self.attn, self.stream, None, *args, **kwargs)
        finally:
            self.is_inside = False
