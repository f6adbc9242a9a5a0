"""Softmax attention in a neighbourhood of the token grid: each token sees the kernel x kernel tokens around it.

Paper: Neighborhood Attention Transformer, arXiv 2204.07143, Eq. 2; dilation: arXiv 2209.15001. At borders the window
is shifted, not cut, so that every token sees the same number of keys.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass

import torch

from ..core.context import Context, Grid
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import GeometryError, OperatorError
from .base import Mixer
from .ops.backends import Backend, WithBackends
from .ops.flex import Sees, flex
from .ops.settings import require_count
from .ops.tiles import dense_attention, tiled_attention

logger = logging.getLogger(__name__)


def around(length: int, kernel: int, dilation: int) -> list[range]:
    """List the places each place of an axis sees, by NATTEN: `kernel` of those of its remainder by the dilation."""
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
    lengths, kernels, dilations = zip(*operator.axes(context.require_grid(operator.name, tokens)), strict=True)
    if len(kernels) == 3 and kernels[0] == 1:
        # natten's windows hold two places or more; frames that see themselves alone are samples of a batch.
        batch = batch * lengths[0]
        lengths = lengths[1:]
        kernels = kernels[1:]
        dilations = dilations[1:]
    images = (part.transpose(1, 2).reshape(batch, *lengths, heads, width) for part in (query, key, value))
    call = {2: functional.na2d, 3: functional.na3d}[len(lengths)]
    mixed = call(*images, kernels, dilation=dilations, scale=context.scale)
    return mixed.reshape(len(query), -1, heads, width).transpose(1, 2)


def _flex(operator: Neighborhood, query, key, value, context: Context) -> torch.Tensor:
    axes = operator.axes(context.require_grid(operator.name, query.shape[2]))
    return flex(query, key, value, _sees, axes, context.scale)


class Neighborhood(WithBackends, Mixer):
    """Images get a square, videos a cube of side `kernel`, or a box of three sides."""

    backends = (
        Backend("natten", _natten, "natten.functional", dtypes=(torch.float16, torch.bfloat16, torch.float32)),
        Backend("flex", _flex, "torch.nn.attention.flex_attention", dtypes=(), runs_on=("cuda", "cpu")),
    )
    needs_grid = True
    ignores_attention_backend = True
    paper = "Neighborhood Attention Transformer, arXiv 2204.07143"

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the neighbourhood.

        Attributes:
            kernel: side of the window in tokens, odd; of videos also (frames, height, width). It shrinks to the frames
                that a video has.
            dilation: steps between the tokens of a window.
            backend: `torch`, `auto`, `natten` or `flex`.
        """

        kernel: int | tuple[int, int, int] = 3
        dilation: int = 1

        def __post_init__(self):
            super().__post_init__()
            sides = (self.kernel,)
            if isinstance(self.kernel, tuple) and len(self.kernel) == 3:
                sides = self.kernel
            if not all(type(side) is int and side > 0 and side % 2 == 1 for side in sides):
                raise OperatorError(
                    "neighborhood: kernel is an odd count of tokens, or three of them for frames, height and width; "
                    f"got {self.kernel!r}. Try 3, 5, 7 or (1, 3, 3)."
                )
            require_count("neighborhood", "dilation", self.dilation, example=1)

        @property
        def sides(self) -> tuple[int, int, int]:
            """The kernel along frames, height and width."""
            if isinstance(self.kernel, tuple):
                return self.kernel
            return (self.kernel, self.kernel, self.kernel)

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        # A kernel knows its window and no more.
        self.honours_mask = config.backend == "torch"
        self.honours_others = config.backend == "torch"
        self.causal_operator = set(config.sides) == {1}
        if self.causal_operator:
            self.unused_inputs = ("input 0", "input 1")  # a softmax of one is one

    def in_torch(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        axes = self.axes(context.require_grid(self.name, query.shape[2]))
        # Small tiles gather fewer keys in vain; wide windows make few of them worth their halo.
        tile = 4 if max(self.config.sides) < 9 else 8
        return tiled_attention(query, key, value, around, axes, tile=tile, scale=context.scale, mask=context.mask)

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute by definition: softmax over all tokens under a mask."""
        axes = self.axes(context.require_grid(self.name, query.shape[2]))
        return dense_attention(query, key, value, around, axes, scale=context.scale, mask=context.mask)

    def receptive_field(self, token: int, grid: Grid) -> set[int]:
        seen = {0}
        for (length, *settings), place in zip(self.axes(grid), grid.place_of(token), strict=True):
            seen = {outer * length + inner for outer in seen for inner in around(length, *settings)[place]}
        return seen

    def axes(self, grid: Grid) -> tuple[tuple[int, int, int], ...]:
        """Return length, kernel and dilation of each axis, as the rule takes them.

        Raises `GeometryError` where the window does not fit the height or width, or is a video's and there is none.
        """
        config = self.config
        if isinstance(config.kernel, tuple) and grid.frames == 1:
            raise GeometryError(
                f"neighborhood: kernel {config.kernel} is for the frames, height and width of a video, and the grid "
                f"is {grid}. Give one number for an image."
            )
        _, *sides = config.sides
        axes = []
        for length, side in zip((grid.height, grid.width), sides, strict=True):
            reach = side * config.dilation
            if reach > length:
                raise GeometryError(
                    f"neighborhood: kernel {config.kernel} with dilation {config.dilation} spans {reach} tokens, "
                    f"but the grid is {grid}. Choose a smaller kernel or dilation, or larger latents."
                )
            axes.append((length, side, config.dilation))
        if grid.frames > 1:
            axes.insert(0, self._frame_axis(grid.frames))
        return tuple(axes)

    def _frame_axis(self, frames: int) -> tuple[int, int, int]:
        """Return the axis of frames, whose window shrinks to them: short videos have few, whatever their size."""
        kernel = self.config.sides[0]
        dilation = min(self.config.dilation, frames)
        fitting = min(kernel, frames // dilation)
        if fitting < kernel and not torch.compiler.is_compiling():
            _say_shrunk(kernel, fitting, frames)
        return frames, fitting, dilation

    def flops(self, tokens: int) -> int:
        """Price the last forward's grid, an image or a video, or an image."""
        return 4 * tokens * self._count_keys(tokens) * self.site.inner_width

    def uncounted_flops(self, tokens: int) -> int:
        """Subtract the pairs that the reference computes and its mask hides."""
        return -4 * tokens * (tokens - self._count_keys(tokens)) * self.site.inner_width

    countable = reference

    def _count_keys(self, tokens: int) -> int:
        """Count the tokens of a window."""
        frames, height, width = self.config.sides
        grid = self.last_grid(tokens)
        if grid is not None and grid.frames > 1:
            return math.prod(kernel for _, kernel, _ in self.axes(grid))
        if isinstance(self.config.kernel, tuple):
            return frames * height * width
        return height * width


@functools.cache
def _say_shrunk(kernel: int, fitting: int, frames: int) -> None:
    """Warn once that a window is as long as the video."""
    logger.warning(
        "neighborhood: a kernel of %d frames shrinks to %d, since the video has %d.", kernel, fitting, frames
    )
