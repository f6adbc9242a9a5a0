"""What the gated short convolutions of the Hyena family share: y = query * inner(key * value), each part featurised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ...core.context import Context, Grid
from ...core.sites import AttentionSite
from ...errors import OperatorError, UnknownNameError
from ..base import Mixer
from .backends import COMPILED, HALF, Backend, WithBackends, compute_dtype
from .depthwise import LAYOUTS, ShortConvolution, heads_first, tokens_last


def _causal_conv1d(operator: GatedConvolution, query, key, value, context: Context) -> torch.Tensor:
    from causal_conv1d import causal_conv1d_fn

    def convolve(convolution: ShortConvolution, image: torch.Tensor) -> torch.Tensor:
        taps = convolution.weight[:, 0, :, 0]
        return causal_conv1d_fn(image[:, :, 0].transpose(1, 2), taps, convolution.bias).transpose(1, 2)[:, :, None]

    if operator.config.layout != "causal_1d" or not 2 <= operator.config.kernel_size <= 4:
        raise OperatorError(
            f'{operator.name}: backend "causal_conv1d" is for the layout causal_1d and kernel sizes from 2 to 4. '
            'Choose backend="torch".'
        )
    return operator.gated(query, key, value, context, convolve)


class GatedConvolution(WithBackends, Mixer):
    """In `2d` the convolutions run on the token grid and see the token above and below, which the paper's never do.

    Attributes:
        has_featurisers: whether queries, keys and values pass a convolution first.
        has_inner: whether the product of keys and values does.
    """

    backends = (Backend("causal_conv1d", _causal_conv1d, "causal_conv1d", dtypes=(*HALF, torch.float32)), COMPILED)
    has_featurisers: ClassVar[bool] = True
    has_inner: ClassVar[bool] = True
    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the convolutions.

        Attributes:
            kernel_size: taps along each axis.
            layout: `causal_1d` (the paper), `centered_1d`, or `2d`.
            backend: `torch`, `auto`, `causal_conv1d` or `compiled` (by torch).
        """

        kernel_size: int = 4
        layout: str = "causal_1d"

        def __post_init__(self):
            super().__post_init__()
            if self.layout not in LAYOUTS:
                raise UnknownNameError(f"layout of {self.owner.name}", self.layout, LAYOUTS)
            if type(self.kernel_size) is not int or self.kernel_size < 1:
                raise OperatorError(
                    f"{self.owner.name}: kernel_size counts taps from 1; got {self.kernel_size!r}. Try 4."
                )

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        width, settings = site.inner_width, (config.kernel_size, config.layout)
        self.needs_grid = config.layout == "2d"
        self.before = config.kernel_size - 1 if config.layout == "causal_1d" else config.kernel_size // 2
        self.causal_operator = self.before == config.kernel_size - 1
        self.convolutions, self.inner = nn.ModuleDict(), None
        if self.has_featurisers:
            parts = ("query", "key", "value")
            self.convolutions.update({name: ShortConvolution(width, *settings) for name in parts})
        if self.has_inner:
            self.inner = ShortConvolution(width, *settings)
            self.inner.set_identity()

    def init_from(self, original: nn.Module) -> None:
        """Both gates open (one), so that values pass unmixed; without featurisers there is no such start."""
        for name, convolution in self.convolutions.items():
            convolution.set_identity() if name == "value" else convolution.set_constant(1.0)

    def in_torch(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        return self.gated(query, key, value, context, ShortConvolution.__call__)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """The definition: every convolution tap by tap."""
        return self.gated(query, key, value, context, ShortConvolution.by_taps)

    def countable(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """Without the outputs beyond the border that `forward` throws away."""
        return self.gated(query, key, value, context, ShortConvolution.padded)

    def gated(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context, convolve
    ) -> torch.Tensor:
        """The whole of it, with `convolve(convolution, image)` for its convolutions."""
        layout = self._layout(query, context)

        def featurised(name: str, part: torch.Tensor) -> torch.Tensor:
            image = tokens_last(part, *layout)
            return convolve(self.convolutions[name], image) if self.has_featurisers else image.to(compute_dtype(image))

        # One after the other, so that the next can have the memory of the last.
        product = _times(featurised("key", key), featurised("value", value), own=self.has_featurisers)
        product = product if self.inner is None else convolve(self.inner, product)
        return heads_first(_times(product, featurised("query", query), own=True), query)

    def _layout(self, query: torch.Tensor, context: Context) -> tuple[int, int]:
        """Rows and columns; a sequence stands upright, one token a row."""
        if not self.needs_grid:
            return query.shape[2], 1
        grid = context.require_grid(self.name, query.shape[2])
        if grid.frames > 1:
            raise OperatorError(
                f"{self.name}: layout 2d mixes one image, and the grid is {grid}. "
                "Choose causal_1d or centered_1d for videos."
            )
        return grid.height, grid.width

    def receptive_field(self, token: int, grid: Grid) -> set[int]:
        depth = self.has_featurisers + self.has_inner
        before, after = depth * self.before, depth * (self.config.kernel_size - 1 - self.before)
        if not self.needs_grid:
            return set(range(max(0, token - before), min(grid.tokens, token + after + 1)))
        y, x = grid.place_of(token)
        rows, columns = (
            range(max(0, place - before), min(length, place + after + 1))
            for place, length in ((y, grid.height), (x, grid.width))
        )
        return {row * grid.width + column for row in rows for column in columns}

    def flops(self, tokens: int) -> int:
        """The convolutions and two gates."""
        convolutions = [*self.convolutions.values(), *([self.inner] if self.has_inner else [])]
        return sum(convolution.flops(tokens) for convolution in convolutions) + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """The gates, which torch's counter does not see."""
        return 2 * tokens * self.site.inner_width


def _times(product: torch.Tensor, part: torch.Tensor, *, own: bool) -> torch.Tensor:
    """In place where the product is ours and no backward pass needs it: new memory costs more than the multiplication."""
    return product * part if torch.is_grad_enabled() or not own else product.mul_(part)
