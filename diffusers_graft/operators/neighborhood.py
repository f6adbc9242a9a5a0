"""Softmax attention in a neighbourhood of the token grid: each token sees the kernel x kernel tokens around it.

Paper: Neighborhood Attention Transformer, arXiv 2204.07143, Eq. 2; dilation: arXiv 2209.15001. At borders the window
is shifted, not cut, so that every token sees the same number of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.context import Context, Grid
from ..core.sites import Site
from ..errors import GeometryError, OperatorError
from .base import Mixer
from .ops.backends import Backend, WithBackends
from .ops.flex import Sees, flex
from .ops.tiles import dense_attention, tiled_attention


def around(length: int, kernel: int, dilation: int) -> list[range]:
    """The places each place of an axis sees, by NATTEN: `kernel` of those of its own remainder by the dilation."""
    rows = []
    for i in range(length):
        peers = range(i % dilation, length, dilation)
        start = min(max(i // dilation - kernel // 2, 0), len(peers) - kernel)
        rows.append(peers[start : start + kernel])
    return rows


def _sees(length: int, kernel: int, dilation: int) -> Sees:
    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        peers = (length - query % dilation + dilation - 1) // dilation
        start = torch.minimum((query // dilation - kernel // 2).clamp(min=0), peers - kernel)
        place = key // dilation
        return (key % dilation == query % dilation) & (place >= start) & (place < start + kernel)

    return sees


def _natten(operator: Neighborhood, query, key, value, context: Context) -> torch.Tensor:
    from natten import functional

    batch, heads, tokens, width = query.shape
    lengths = operator.lengths(context.require_grid(operator.name, tokens))
    images = (part.transpose(1, 2).reshape(batch, *lengths, heads, width) for part in (query, key, value))
    call = functional.na3d if len(lengths) == 3 else functional.na2d
    settings = {"dilation": operator.config.dilation, "scale": context.scale}
    mixed = call(*images, operator.config.kernel, **settings)
    return mixed.reshape(batch, -1, heads, width).transpose(1, 2)


def _flex(operator: Neighborhood, query, key, value, context: Context) -> torch.Tensor:
    return flex(
        query, key, value, _sees, operator.axes(context.require_grid(operator.name, query.shape[2])), context.scale
    )


class Neighborhood(WithBackends, Mixer):
    """Images get a square, videos a cube of side `kernel`."""

    backends = (
        Backend("natten", _natten, "natten.functional", dtypes=(torch.float16, torch.bfloat16, torch.float32)),
        Backend("flex", _flex, "torch.nn.attention.flex_attention", dtypes=(), runs_on=("cuda", "cpu")),
    )
    needs_grid = True
    paper = "Neighborhood Attention Transformer, arXiv 2204.07143"

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the neighbourhood.

        Attributes:
            kernel: side of the window in tokens, odd.
            dilation: steps between the tokens of a window.
            backend: `torch`, `auto`, `natten` or `flex`.
        """

        kernel: int = 3
        dilation: int = 1

        def __post_init__(self):
            super().__post_init__()
            if type(self.kernel) is not int or self.kernel < 1 or self.kernel % 2 == 0:
                raise OperatorError(
                    f"neighborhood: kernel is an odd count of tokens; got {self.kernel!r}. Try 3, 5 or 7."
                )
            if type(self.dilation) is not int or self.dilation < 1:
                raise OperatorError(f"neighborhood: dilation counts steps from 1; got {self.dilation!r}. Try 1.")

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        self.honours_mask = self.honours_others = config.backend == "torch"  # a kernel knows its window and no more
        self.causal_operator = config.kernel == 1
        if config.kernel == 1:
            self.unused_inputs = ("input 0", "input 1")  # a softmax of one is one

    def in_torch(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        axes = self.axes(context.require_grid(self.name, query.shape[2]))
        tile = 4 if self.config.kernel < 9 else 8
        return tiled_attention(query, key, value, around, axes, tile=tile, scale=context.scale, mask=context.mask)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """The definition: softmax over all tokens under a mask."""
        axes = self.axes(context.require_grid(self.name, query.shape[2]))
        return dense_attention(query, key, value, around, axes, scale=context.scale, mask=context.mask)

    def receptive_field(self, token: int, grid: Grid) -> set[int]:
        seen = {0}
        for (length, *settings), place in zip(self.axes(grid), grid.place_of(token), strict=True):
            seen = {outer * length + inner for outer in seen for inner in around(length, *settings)[place]}
        return seen

    def lengths(self, grid: Grid) -> tuple[int, ...]:
        """Of the axes of a grid. Raises `GeometryError` where the window does not fit."""
        lengths = (grid.frames, grid.height, grid.width) if grid.frames > 1 else (grid.height, grid.width)
        reach = self.config.kernel * self.config.dilation
        if min(lengths) < reach:
            raise GeometryError(
                f"neighborhood: kernel {self.config.kernel} with dilation {self.config.dilation} spans {reach} tokens, "
                f"but the grid is {grid}. Choose a smaller kernel or dilation, or larger latents."
            )
        return lengths

    def axes(self, grid: Grid) -> tuple[tuple[int, int, int], ...]:
        """Each axis as the rule takes it."""
        return tuple((length, self.config.kernel, self.config.dilation) for length in self.lengths(grid))

    def flops(self, tokens: int) -> int:
        """Of the last forward's grid, an image or a video, or of an image."""
        return 4 * tokens * self._seen(tokens) * self.site.inner_width

    def uncounted_flops(self, tokens: int) -> int:
        """Minus the pairs that the reference computes and its mask hides."""
        return -4 * tokens * (tokens - self._seen(tokens)) * self.site.inner_width

    countable = reference

    def _seen(self, tokens: int) -> int:
        """Tokens of a window."""
        grid = self.last_grid(tokens)
        return self.config.kernel ** (3 if grid and grid.frames > 1 else 2)
