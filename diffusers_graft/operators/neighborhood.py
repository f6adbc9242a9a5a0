"""Softmax attention in a neighbourhood of the token grid: each token sees the kernel x kernel tokens around it.

Papers: Neighborhood Attention Transformer, arXiv 2204.07143, Eq. 2; dilation: arXiv 2209.15001; strides: Generalized
Neighborhood Attention, arXiv 2504.16922; windows of whole tiles (a stride as long as a tile): Sliding Tile Attention,
arXiv 2502.04507; circles and down-sampled keys: CLEAR, arXiv 2412.16112. At borders a box is shifted, not cut, so
that every token sees the same number of keys; a circle is cut, as in CLEAR.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context, Grid
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import GeometryError, OperatorError, UnknownNameError
from .base import Mixer, rare
from .ops.backends import Backend, WithBackends, has_mask_or_others
from .ops.depthwise import count_pooled, pool_tokens
from .ops.flex import Sees, flex
from .ops.masks import mask_others
from .ops.settings import require_count
from .ops.tiles import Pairs, dense_attention, tiled_attention

logger = logging.getLogger(__name__)

SHAPES = ("box", "circle")


def around(length: int, kernel: int, dilation: int, stride: int = 1) -> list[range]:
    """List the places each place of an axis sees, by NATTEN: `kernel` of those of its remainder by the dilation.

    `stride` neighbours share the window that is around all of them.
    """
    rows = []
    for i in range(length):
        peers = range(i % dilation, length, dilation)
        first = i // dilation // stride * stride
        # As natten has it where one of kernel and stride is even: a video with few frames can shrink one of them.
        start = min(max(first + stride // 2 - kernel // 2, 0), len(peers) - kernel)
        rows.append(peers[start : start + kernel])
    return rows


def near(length: int, kernel: int, dilation: int, stride: int) -> list[range]:
    """List the places of a window of `kernel` around each place of an axis, cut off at both ends."""
    reach = kernel // 2
    return [range(max(0, i - reach), min(length, i + reach + 1)) for i in range(length)]


def in_circle(
    lengths: tuple[int, ...], query: torch.Tensor, key: torch.Tensor, kernels: tuple[int, ...]
) -> torch.Tensor:
    """Return whether a key lies in the circle around a query, or in the ellipse of as many diameters as axes.

    Args:
        query, key: raster indices.
        kernels: tokens across it along each axis, odd: a circle of radius (kernel + 1) / 2 without its rim.
    """
    # All times the product of the squared diameters, so that whole numbers decide.
    limit = math.prod((kernel + 1) ** 2 for kernel in kernels)
    distance: Any = 0
    for length, kernel in zip(reversed(lengths), reversed(kernels), strict=True):
        step = query % length - key % length
        distance = distance + (2 * step) ** 2 * (limit // (kernel + 1) ** 2)
        query = query // length
        key = key // length
    return distance < limit


def _sees(length: int, kernel: int, dilation: int, stride: int = 1) -> Sees:
    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        peers = (length - query % dilation + dilation - 1) // dilation
        first = query // dilation // stride * stride
        start = torch.minimum((first + stride // 2 - kernel // 2).clamp(min=0), peers - kernel)
        place = key // dilation
        return (key % dilation == query % dilation) & (place >= start) & (place < start + kernel)

    return sees


def _natten(operator: Neighborhood, query, key, value, context: Context) -> torch.Tensor:
    from natten import functional

    batch, heads, tokens, width = query.shape
    axes = operator.axes(context.require_grid(operator.name, tokens))
    # natten's windows hold two places or more; along an axis where tokens see themselves alone, they are samples.
    alone = [number for number, (_, kernel, *_) in enumerate(axes) if kernel == 1]
    seen = [number for number in range(len(axes)) if number not in alone]
    if not seen:
        return value
    lengths = [axis[0] for axis in axes]
    order = [0, *(1 + number for number in (*alone, *seen)), 1 + len(axes), 2 + len(axes)]
    images = (
        part.transpose(1, 2).reshape(batch, *lengths, heads, width).permute(order).flatten(0, len(alone))
        for part in (query, key, value)
    )
    _, kernels, dilations, strides = zip(*(axes[number] for number in seen), strict=True)
    call = {1: functional.na1d, 2: functional.na2d, 3: functional.na3d}[len(seen)]
    settings = {"stride": strides} if max(strides) > 1 else {}
    mixed = call(*images, kernels, dilation=dilations, scale=context.scale, **settings)
    mixed = mixed.unflatten(0, [batch, *(lengths[number] for number in alone)])
    back = [order.index(number) for number in range(len(order))]
    return mixed.permute(back).reshape(batch, tokens, heads, width).transpose(1, 2)


def _flex(operator: Neighborhood, query, key, value, context: Context) -> torch.Tensor:
    axes = operator.axes(context.require_grid(operator.name, query.shape[2]))
    return flex(query, key, value, _sees, axes, context.scale)


class Neighborhood(WithBackends, Mixer):
    """Images get a square, videos a cube of side `kernel`, or a box of three sides."""

    backends = (
        Backend(
            "natten",
            _natten,
            "natten.functional",
            dtypes=(torch.float16, torch.bfloat16, torch.float32),
            flag="HAS_LIBNATTEN",
        ),
        Backend("flex", _flex, "torch.nn.attention.flex_attention", dtypes=(), runs_on=("cuda", "cpu")),
    )
    needs_grid = True
    ignores_attention_backend = True
    exact_with = "a kernel as large as the grid"
    paper = "Neighborhood Attention Transformer, arXiv 2204.07143"

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the neighbourhood.

        Attributes:
            kernel: side of the window in tokens, odd, or of the stride's parity; of videos also (frames, height,
                width). It shrinks to the frames that a video has, and to a sequence of one row.
            dilation: steps between the tokens of a window.
            stride: neighbours along an axis that share one window around them; of videos also three of them. As long
                as a tile, with a kernel of an odd number of tiles, on a grid that tiles divide, it is Sliding Tile
                Attention.
            shape: `box`, or `circle` (CLEAR), the kernel being its diameter: tokens nearer than (kernel + 1) / 2.
            far: side of the squares whose keys and values every token sees besides as one each, pooled by learned
                weights that start as an average (CLEAR); 0 for none.
            backend: `torch`, `auto`, `natten` or `flex`.
        """

        kernel: int | tuple[int, int, int] = 3
        dilation: int = 1
        stride: int | tuple[int, int, int] = rare(1)
        shape: str = rare("box")
        far: int = rare(0)

        def __post_init__(self):
            super().__post_init__()
            self._check_stride()
            sides: tuple[Any, ...] = (self.kernel,)
            if isinstance(self.kernel, tuple) and len(self.kernel) == 3:
                sides = self.kernel
            are_counts = all(type(side) is int and side > 0 for side in sides)
            if are_counts and self.strides != (1, 1, 1):
                self._check_kernel_of_stride()
            elif not are_counts or not all(side % 2 == 1 for side in sides):
                raise OperatorError(
                    "neighborhood: kernel is an odd count of tokens, or three of them for frames, height and width; "
                    f"got {self.kernel!r}. Try 3, 5, 7 or (1, 3, 3)."
                )
            require_count("neighborhood", "dilation", self.dilation, example=1)
            if self.shape not in SHAPES:
                raise UnknownNameError("shape of neighborhood", self.shape, SHAPES)
            if self.shape == "circle" and (self.dilation > 1 or self.strides != (1, 1, 1)):
                raise OperatorError(
                    "neighborhood: a circle has neither dilation nor stride; got "
                    f'dilation={self.dilation}, stride={self.stride}. Leave them out, or choose shape="box".'
                )
            require_count("neighborhood", "far", self.far, least=0, example=4)
            if (self.shape == "circle" or self.far) and self.backend not in ("torch", "auto"):
                raise OperatorError(
                    f"neighborhood: backend {self.backend!r} knows boxes alone, and neither circles nor far keys. "
                    'Choose "torch".'
                )

        def _check_stride(self) -> None:
            strides = self.stride if isinstance(self.stride, tuple) else (self.stride,)
            if len(strides) not in (1, 3) or not all(type(side) is int and side > 0 for side in strides):
                raise OperatorError(
                    "neighborhood: stride is a count of tokens, or three of them for frames, height and width; "
                    f"got {self.stride!r}. Try 1 or 8."
                )

        def _check_kernel_of_stride(self) -> None:
            for kernel, stride in zip(self.sides, self.strides, strict=True):
                if kernel < stride or (kernel - stride) % 2:
                    raise OperatorError(
                        f"neighborhood: a window of {kernel} tokens is not around {stride} that share it with as many "
                        f"on both sides. Choose a kernel of {stride + 2 * (max(kernel - stride, 0) // 2 + 1)}."
                    )

        @property
        def strides(self) -> tuple[int, int, int]:
            """The stride along frames, height and width."""
            if isinstance(self.stride, tuple):
                return self.stride
            return (self.stride, self.stride, self.stride)

        @property
        def papers(self) -> tuple[str, ...]:
            papers = [*super().papers]
            if self.dilation != 1:
                papers.append("Dilated Neighborhood Attention Transformer, arXiv 2209.15001")
            if set(self.strides) != {1}:
                papers.append("Generalized Neighborhood Attention, arXiv 2504.16922")
                papers.append("Fast Video Generation with Sliding Tile Attention, arXiv 2502.04507")
            if self.shape == "circle" or self.far:
                papers.append("CLEAR, arXiv 2412.16112")
            return tuple(papers)

        @property
        def sides(self) -> tuple[int, int, int]:
            """The kernel along frames, height and width."""
            if isinstance(self.kernel, tuple):
                return self.kernel
            return (self.kernel, self.kernel, self.kernel)

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        # A kernel knows its window and no more, and pooled keys hide nothing.
        self.honours_mask = config.backend in ("torch", "auto") and not config.far
        self.honours_others = config.backend == "torch"
        self.causal_operator = set(config.sides) == {1} and not config.far
        if self.causal_operator:
            self.unused_inputs = ("input 0", "input 1")  # a softmax of one is one
        self.far_weight = None
        if config.far:
            # One for all channels, for keys and values.
            self.far_weight = nn.Parameter(torch.full((config.far, config.far), config.far**-2.0))

    def is_for_torch(self, inputs: Sequence[torch.Tensor], context: Context) -> bool:
        return has_mask_or_others(inputs, context)

    def in_torch(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        rule, axes, pairs = self._window(context.require_grid(self.name, query.shape[2]))
        # Small tiles gather fewer keys in vain; wide windows make few of them worth their halo.
        tile = 4 if max(self.config.sides) < 9 else 8
        # Queries that share a window belong in one tile.
        tile = max(tile, *self.config.strides)
        key, value, mask = self._add_far(key, value, context)
        settings = {"tile": tile, "scale": context.scale, "mask": mask, "pairs": pairs}
        return tiled_attention(query, key, value, rule, axes, **settings)

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute by definition: softmax over all tokens under a mask."""
        rule, axes, pairs = self._window(context.require_grid(self.name, query.shape[2]))
        key, value, mask = self._add_far(key, value, context)
        return dense_attention(query, key, value, rule, axes, scale=context.scale, mask=mask, pairs=pairs)

    def _window(self, grid: Grid) -> tuple[Any, tuple[tuple[int, ...], ...], Pairs | None]:
        """Return what a token sees: the rule of each axis, the axes, and what cuts a circle out of them."""
        axes = self.axes(grid)
        if self.config.shape == "box":
            return around, axes, None
        return near, axes, (in_circle, tuple(kernel for _, kernel, *_ in axes))

    def _add_far(
        self, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put pooled keys and values behind the grid's, before those of a prompt, and in the mask."""
        if self.far_weight is None:
            return key, value, context.mask
        grid = context.grid
        assert grid is not None
        tokens = grid.tokens
        pooled_key = self._pool(key[:, :, :tokens], grid)
        mask = mask_others(context.mask, tokens, tokens + pooled_key.shape[2])
        key = torch.cat([key[:, :, :tokens], pooled_key, key[:, :, tokens:]], dim=2)
        pooled_value = self._pool(value[:, :, :tokens], grid)
        value = torch.cat([value[:, :, :tokens], pooled_value, value[:, :, tokens:]], dim=2)
        return key, value, mask

    def _pool(self, part: torch.Tensor, grid: Grid) -> torch.Tensor:
        assert self.far_weight is not None
        width = part.shape[1] * part.shape[3]
        # The same for every channel, as published: a depthwise convolution whose filters are one.
        weight = self.far_weight.expand(width, 1, -1, -1)

        def convolve(image: torch.Tensor) -> torch.Tensor:
            return F.conv2d(image, weight, stride=self.config.far, groups=width)

        return pool_tokens(part, grid, self.config.far, convolve)

    def receptive_field(self, token: int, grid: Grid) -> set[int] | range:
        if self.config.far:
            return range(grid.tokens)
        rule, axes, pairs = self._window(grid)
        seen = {0}
        for (length, *settings), place in zip(axes, grid.place_of(token), strict=True):
            seen = {outer * length + inner for outer in seen for inner in rule(length, *settings)[place]}
        if pairs is None:
            return seen
        keys = torch.tensor(sorted(seen), device="cpu")
        lengths = tuple(length for length, *_ in axes)
        return set(keys[in_circle(lengths, torch.tensor(token, device="cpu"), keys, pairs[1])].tolist())

    def axes(self, grid: Grid) -> tuple[tuple[int, ...], ...]:
        """Return length, kernel, dilation and stride of each axis, as the rule takes them.

        Raises `GeometryError` where the window does not fit the height or width, or is a video's and there is none.
        """
        config = self.config
        for name in ("kernel", "stride"):
            sides = getattr(config, name)
            if isinstance(sides, tuple) and grid.frames == 1:
                raise GeometryError(
                    f"neighborhood: {name} {sides} is for the frames, height and width of a video, and the grid "
                    f"is {grid}. Give one number for an image."
                )
        _, *sides = config.sides
        _, *strides = config.strides
        axes = []
        for length, side, stride in zip((grid.height, grid.width), sides, strides, strict=True):
            reach = side * config.dilation
            if length == 1:
                # A sequence has one row, which is all there is to see of rows.
                axes.append((1, 1, 1, 1))
                continue
            if reach > length and config.shape == "box":
                raise GeometryError(
                    f"neighborhood: kernel {config.kernel} with dilation {config.dilation} spans {reach} tokens, "
                    f"but the grid is {grid}. Choose a smaller kernel or dilation, or larger latents."
                )
            axes.append((length, side, config.dilation, stride))
        if grid.frames > 1:
            axes.insert(0, self._frame_axis(grid.frames))
        return tuple(axes)

    def _frame_axis(self, frames: int) -> tuple[int, ...]:
        """Return the axis of frames, whose window shrinks to them: short videos have few, whatever their size."""
        kernel = self.config.sides[0]
        stride = self.config.strides[0]
        if self.config.shape == "circle":
            return frames, kernel, 1, 1
        dilation = min(self.config.dilation, frames)
        fitting = min(kernel, frames // dilation)
        if fitting < kernel and not torch.compiler.is_compiling():
            _say_shrunk(kernel, fitting, frames)
        return frames, fitting, dilation, min(stride, fitting)

    def flops(self, tokens: int) -> int:
        """Price the last forward's grid, an image or a video, or an image."""
        far = 0
        if self.config.far:
            far = count_pooled(self.last_grid(tokens), tokens, self.config.far)
        pairs = self._count_pairs(tokens) + tokens * far
        return 4 * (pairs + far * self.config.far**2) * self.site.inner_width

    def uncounted_flops(self, tokens: int) -> int:
        """Subtract the pairs that the reference computes and its mask hides."""
        return -4 * (tokens**2 - self._count_pairs(tokens)) * self.site.inner_width

    countable = reference

    def _count_pairs(self, tokens: int) -> int:
        """Count the tokens of all windows together."""
        grid = self.last_grid(tokens)
        _, *kernels = self.config.sides
        if isinstance(self.config.kernel, tuple):
            kernels = list(self.config.kernel)
        lengths = None
        if grid is not None:
            axes = self.axes(grid)
            lengths = [axis[0] for axis in axes]
            kernels = [axis[1] for axis in axes]
        if self.config.shape == "box":
            return tokens * math.prod(kernels)
        return _count_in_circles(tokens, lengths, tuple(kernels))


def _count_in_circles(tokens: int, lengths: list[int] | None, kernels: tuple[int, ...]) -> int:
    """Count the pairs of tokens in each other's circle: step by step, as many as have a token that far away."""
    limit = math.prod((kernel + 1) ** 2 for kernel in kernels)
    pairs = 0
    for step in itertools.product(*(range(-(kernel // 2), kernel // 2 + 1) for kernel in kernels)):
        axes = zip(step, kernels, strict=True)
        distance = sum((2 * along) ** 2 * (limit // (kernel + 1) ** 2) for along, kernel in axes)
        if distance >= limit:
            continue
        if lengths is None:
            pairs += tokens
        else:
            pairs += math.prod(max(0, length - abs(along)) for length, along in zip(lengths, step, strict=True))
    return pairs


@functools.cache
def _say_shrunk(kernel: int, fitting: int, frames: int) -> None:
    """Warn once that a window is as long as the video."""
    logger.warning(
        "neighborhood: a kernel of %d frames shrinks to %d, since the video has %d.", kernel, fitting, frames
    )
