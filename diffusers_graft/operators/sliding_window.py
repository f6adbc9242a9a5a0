"""Softmax attention in a band of the raster order: each token sees `window` tokens before and after it.

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, Table 4 (SWA, w = 4, bidirectional).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.context import Context, Grid
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import GeometryError, OperatorError
from .base import Mixer
from .ops.backends import Backend, WithBackends, has_mask_or_others
from .ops.flex import Sees, flex
from .ops.tiles import dense_attention, tiled_attention


def band(length: int, before: int, after: int) -> list[range]:
    """List the places each place of a sequence sees; the band is cut off at both ends."""
    return [range(max(0, i - before), min(length, i + after + 1)) for i in range(length)]


def _sees(length: int, before: int, after: int) -> Sees:
    return lambda query, key: (key >= query - before) & (key <= query + after)


def _flash(operator: SlidingWindow, query, key, value, context: Context) -> torch.Tensor:
    from flash_attn import flash_attn_func

    ((_, *window),) = operator.axes(query)
    tokens_first = (part.transpose(1, 2) for part in (query, key, value))
    mixed = flash_attn_func(*tokens_first, softmax_scale=context.scale, window_size=tuple(window))
    return mixed.transpose(1, 2)


def _varlen(operator: SlidingWindow, query, key, value, context: Context) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, tokens, width = query.shape
    ((_, *window),) = operator.axes(query)
    # Samples of a batch are sequences of one length, packed one after the other.
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    query, key, value = (part.transpose(1, 2).reshape(batch * tokens, heads, width) for part in (query, key, value))
    settings = {"scale": context.scale, "window_size": tuple(window)}
    mixed: Any = varlen_attn(query, key, value, starts, starts, tokens, tokens, **settings)
    return mixed.view(batch, tokens, heads, width).transpose(1, 2)


def _flex(operator: SlidingWindow, query, key, value, context: Context) -> torch.Tensor:
    return flex(query, key, value, _sees, operator.axes(query), context.scale)


class SlidingWindow(WithBackends, Mixer):
    """Softmax in a band of the raster order, without a grid, so also for sequences; never the token above or below."""

    backends = (
        Backend("flash", _flash, "flash_attn"),
        Backend("varlen", _varlen, "torch.nn.attention.varlen"),
        Backend("flex", _flex, "torch.nn.attention.flex_attention", dtypes=(), runs_on=("cuda", "cpu")),
    )
    ignores_attention_backend = True
    exact_with = "a window over all tokens"
    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the band.

        Attributes:
            window: tokens seen before and after each token.
            backend: `torch`, `auto`, `flash` (flash-attn), `varlen` (torch's own, CUDA) or `flex`.
        """

        window: tuple[int, int] = (4, 4)

        def __post_init__(self):
            super().__post_init__()
            is_pair = isinstance(self.window, tuple) and len(self.window) == 2
            if not is_pair or not all(type(side) is int and side >= 0 for side in self.window):
                raise OperatorError(
                    "sliding_window: window is (before, after), two counts of tokens; "
                    f"got {self.window!r}. Try (4, 4)."
                )

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        # A kernel knows its window and no more.
        self.honours_mask = config.backend in ("torch", "auto")
        self.honours_others = config.backend == "torch"
        self.causal_operator = config.window[1] == 0
        if config.window == (0, 0):
            self.unused_inputs = ("input 0", "input 1")  # a softmax of one is one

    def is_for_torch(self, inputs: Sequence[torch.Tensor], context: Context) -> bool:
        return has_mask_or_others(inputs, context)

    def in_torch(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        # Short tiles compare fewer pairs in vain; a backward pass pays for every halo, and prefers fewer.
        reach = max(self.config.window)
        if not torch.is_grad_enabled():
            reach = reach // 4
        settings = {"tile": max(32, reach), "scale": context.scale, "mask": context.mask}
        return tiled_attention(query, key, value, band, self.axes(query), **settings)

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute by definition: softmax over all tokens under a band mask."""
        return dense_attention(query, key, value, band, self.axes(query), scale=context.scale, mask=context.mask)

    def axes(self, query: torch.Tensor) -> tuple[tuple[int, int, int], ...]:
        """Return the sequence as one axis. Raises `GeometryError` where the window does not fit."""
        tokens = query.shape[2]
        width = sum(self.config.window) + 1
        if width > tokens:
            raise GeometryError(
                f"sliding_window: window {self.config.window} spans {width} tokens, and there are {tokens}. "
                "Choose a smaller window, or self_attention, which sees them all."
            )
        return ((tokens, *self.config.window),)

    def receptive_field(self, token: int, grid: Grid) -> range:
        return band(grid.tokens, *self.config.window)[token]

    def flops(self, tokens: int) -> int:
        return 4 * self._count_pairs(tokens) * self.site.inner_width

    def uncounted_flops(self, tokens: int) -> int:
        """Subtract the pairs that the reference computes and its mask hides."""
        return -4 * (tokens**2 - self._count_pairs(tokens)) * self.site.inner_width

    countable = reference

    def _count_pairs(self, tokens: int) -> int:
        return sum(map(len, band(tokens, *self.config.window)))
