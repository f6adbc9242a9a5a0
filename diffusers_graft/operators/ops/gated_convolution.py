"""Gated short convolutions, which the Hyena family is made of: y = query * inner(key * value)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...core.context import Context, Grid
from ...core.shapes import HeadTensor, KeyTensor
from ...core.sites import AttentionSite
from ...errors import OperatorError, UnknownNameError
from ..base import Mixer
from .backends import COMPILED, HALF, Backend, WithBackends, compute_dtype
from .depthwise import (
    LAYOUTS,
    Convolve,
    ShortConvolution,
    ShortConvolutions,
    VideoConvolution,
    heads_first,
    tokens_last,
)
from .settings import require_count


def _causal_conv1d(operator: GatedConvolution, query, key, value, context: Context) -> torch.Tensor:
    from causal_conv1d import causal_conv1d_fn

    def convolve(convolution: ShortConvolution, image: torch.Tensor) -> torch.Tensor:
        taps = convolution.weight[:, 0, :, 0]
        sequence = image[:, :, 0].transpose(1, 2)
        return causal_conv1d_fn(sequence, taps, convolution.bias).transpose(1, 2)[:, :, None]

    return operator.gate(query, key, value, context, convolve)


def _refuse_causal_conv1d(config: GatedConvolution.Config) -> str | None:
    if config.layout != "causal_1d" or not 2 <= config.kernel_size <= 4:
        return "it is for the layout causal_1d and kernel sizes from 2 to 4"
    return None


def _triton(operator: GatedConvolution, query, key, value, context: Context) -> torch.Tensor:
    from ..kernels.gated_convolution import gated_convolution

    convolutions = list(operator.convolutions.values())
    if operator.inner is not None:
        convolutions.append(operator.inner)
    precise = torch.promote_types(query.dtype, torch.float32)
    filters = [torch.cat([part.weight.flatten(1).T, part.bias[None]]).to(precise) for part in convolutions]
    parts = [part.transpose(1, 2).flatten(2) for part in (query, key, value)]
    # Views of projections, in one tensor or in three, are taken as they lie.
    if parts[0].stride(2) != 1 or len({part.stride() for part in parts}) > 1:
        parts = [part.contiguous() for part in parts]
    taps = [*convolutions[0].kernel_size, *convolutions[0].before]
    mixed = gated_convolution(*parts, torch.stack(filters), taps, *operator._layout(query, context))
    return heads_first(mixed, query)


def _refuse_triton(config: GatedConvolution.Config) -> str | None:
    if config.layout == "3d":
        return "it knows no layout 3d"
    taps = config.kernel_size ** (2 if config.layout == "2d" else 1)
    # A convolution of convolutions is computed anew for every tap of the outer one.
    owner: Any = config.owner
    most = 8 if owner.has_featurisers and owner.has_inner else 25
    if taps > most:
        return f"it is for filters of at most {most} taps, and these have {taps}"
    return None


class GatedConvolution(WithBackends, Mixer):
    """In `2d` the convolutions run on the token grid and see the token above and below, which the paper's never do.

    Attributes:
        has_featurisers: whether queries, keys and values pass a convolution first.
        has_inner: whether the product of keys and values does.
    """

    backends = (
        Backend(
            "causal_conv1d",
            _causal_conv1d,
            "causal_conv1d",
            dtypes=(*HALF, torch.float32),
            refuses=_refuse_causal_conv1d,
        ),
        Backend("triton", _triton, "triton", dtypes=(), refuses=_refuse_triton),
        COMPILED,
    )
    has_featurisers: ClassVar[bool] = True
    has_inner: ClassVar[bool] = True
    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the convolutions.

        Attributes:
            kernel_size: taps along each axis.
            layout: `causal_1d` (the paper), `centered_1d`, `2d`, or `3d` for videos.
            backend: `torch`, `auto`, `causal_conv1d`, `triton` (all in one pass) or `compiled` (by torch).
        """

        kernel_size: int = 4
        layout: str = "causal_1d"

        def __post_init__(self):
            super().__post_init__()
            if self.layout not in LAYOUTS:
                raise UnknownNameError(f"layout of {self.owner.name}", self.layout, LAYOUTS)
            require_count(self.owner.name, "kernel_size", self.kernel_size, example=4)

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        size = config.kernel_size
        self.needs_grid = config.layout in ("2d", "3d")
        # As torch pads "same": an even filter reaches one token further back.
        self.before = size - 1 if config.layout == "causal_1d" else size // 2
        self.causal_operator = self.before == size - 1
        self.convolutions = ShortConvolutions()
        if self.has_featurisers:
            for name in ("query", "key", "value"):
                self.convolutions[name] = _make_convolution(site.inner_width, config)
        self.inner = None
        if self.has_inner:
            self.inner = _make_convolution(site.inner_width, config)
            self.inner.set_identity()

    def init_from(self, original: nn.Module) -> None:
        """Open both gates (one), so that values pass unmixed; without featurisers there is no such start."""
        for convolution in self.convolutions.values():
            convolution.set_constant(1.0)
        if self.has_featurisers:
            self.convolutions["value"].set_identity()

    def in_torch(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        return self.gate(query, key, value, context, ShortConvolution.__call__)

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute by definition: every convolution tap by tap."""
        return self.gate(query, key, value, context, _by_taps)

    def countable(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute without the outputs beyond the border, which `forward` drops."""
        return self.gate(query, key, value, context, _padded)

    def gate(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: Context,
        convolve: Convolve,
    ) -> torch.Tensor:
        """Compute the output, [B, H, N, E], with `convolve(convolution, image)` for its convolutions."""
        layout = self._layout(query, context)

        def featurise(name: str, part: torch.Tensor) -> torch.Tensor:
            *frames, height, width = layout
            image = tokens_last(part, height, width)
            if frames:
                image = image.unflatten(0, (-1, *frames))
            if self.has_featurisers:
                return convolve(self.convolutions[name], image)
            return image.to(compute_dtype(image))

        # One after the other, so that the next can have the memory of the last.
        product = _multiply(featurise("key", key), featurise("value", value), in_place=self.has_featurisers)
        if self.inner is not None:
            product = convolve(self.inner, product)
        return heads_first(_multiply(product, featurise("query", query), in_place=True), query)

    def _layout(self, query: torch.Tensor, context: Context) -> tuple[int, ...]:
        """Return rows and columns of the image, behind the frames of a video; a sequence has one token a row."""
        if not self.needs_grid:
            return query.shape[2], 1
        grid = context.require_grid(self.name, query.shape[2])
        if self.config.layout == "3d":
            return grid.frames, grid.height, grid.width
        if grid.frames > 1:
            raise OperatorError(
                f"{self.name}: layout 2d mixes one image, and the grid is {grid}. "
                "Choose causal_1d or centered_1d for videos, or 3d."
            )
        return grid.height, grid.width

    def receptive_field(self, token: int, grid: Grid) -> set[int]:
        # Each convolution reaches as far again.
        depth = self.has_featurisers + self.has_inner
        before = depth * self.before
        after = depth * (self.config.kernel_size - 1 - self.before)
        if not self.needs_grid:
            return set(range(max(0, token - before), min(grid.tokens, token + after + 1)))
        *frame, y, x = grid.place_of(token)
        frames = [0]
        if frame:
            frames = range(max(0, frame[0] - before), min(grid.frames, frame[0] + after + 1))
        rows = range(max(0, y - before), min(grid.height, y + after + 1))
        columns = range(max(0, x - before), min(grid.width, x + after + 1))
        places = itertools.product(frames, rows, columns)
        return {(frame * grid.height + row) * grid.width + column for frame, row, column in places}

    def flops(self, tokens: int) -> int:
        """Price the convolutions and two gates."""
        operations = self.uncounted_flops(tokens)
        for convolution in self.convolutions.values():
            operations += convolution.flops(tokens)
        if self.inner is not None:
            operations += self.inner.flops(tokens)
        return operations

    def uncounted_flops(self, tokens: int) -> int:
        """Count the gates, which torch's counter does not see."""
        return 2 * tokens * self.site.inner_width


def _make_convolution(width: int, config: GatedConvolution.Config) -> Any:
    """Make a convolution over tokens as they lie."""
    if config.layout == "3d":
        return VideoConvolution(width, config.kernel_size)
    return ShortConvolution(width, config.kernel_size, config.layout)


def _by_taps(convolution: Any, image: torch.Tensor) -> torch.Tensor:
    return convolution.by_taps(image)


def _padded(convolution: Any, image: torch.Tensor) -> torch.Tensor:
    return convolution.padded(image)


def _multiply(product: torch.Tensor, part: torch.Tensor, *, in_place: bool) -> torch.Tensor:
    """Multiply in place where that is allowed and no backward pass needs the product: new memory costs more."""
    if torch.is_grad_enabled() or not in_place:
        return product * part
    return product.mul_(part)
