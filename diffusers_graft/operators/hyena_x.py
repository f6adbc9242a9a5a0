"""Gated short convolutions: y = q * k * v, each after a depthwise convolution.

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, section 3 (Hyena-X, K = 4, causal).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import OperatorError, UnknownNameError
from ..site import Context, Site
from ._depthwise import by_taps, tokens_last
from .base import Mixer

LAYOUTS = ("causal_1d", "centered_1d", "2d")


class HyenaX(Mixer):
    """In `2d` the convolutions run on the token grid and see the token above and below, which the paper's never do."""

    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"
    start = "projections keep their pretrained weights; both gates start open (one), so that values pass unmixed"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings of the convolutions.

        Attributes:
            kernel_size: taps along each axis.
            layout: `causal_1d` (the paper), `centered_1d`, or `2d`.
        """

        kernel_size: int = 4
        layout: str = "causal_1d"

        def __post_init__(self):
            super().__post_init__()
            if self.layout not in LAYOUTS:
                raise UnknownNameError("layout of hyena_x", self.layout, LAYOUTS)
            if type(self.kernel_size) is not int or self.kernel_size < 1:
                raise OperatorError(f"hyena_x: kernel_size counts taps from 1; got {self.kernel_size!r}. Try 4.")

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        width, size = site.inner_width, config.kernel_size
        self.needs_grid = config.layout == "2d"
        taps = (size, size) if self.needs_grid else (1, size)
        before = size - 1 if config.layout == "causal_1d" else size // 2
        self.causal_operator = before == size - 1
        self.before = (before, before if self.needs_grid else 0)
        self.convolutions = nn.ModuleDict(
            {name: nn.Conv2d(width, width, taps, groups=width) for name in ("query", "key", "value")}
        )

    @torch.no_grad()
    def init_from(self, original: nn.Module) -> None:
        for name, convolution in self.convolutions.items():
            convolution.weight.zero_()
            convolution.bias.fill_(0.0 if name == "value" else 1.0)
        self._upright(self.convolutions["value"])[:, :, self.before[0], self.before[1]] = 1.0

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        height, width = self._layout(query, context)
        parts = zip(self.convolutions.values(), (query, key, value), strict=True)
        query, key, value = (self._convolved(convolution, part, height, width) for convolution, part in parts)
        return rearrange(query * key * value, "b (h e) y x -> b h (y x) e", e=self.site.head_width)

    def _layout(self, query: torch.Tensor, context: Context) -> tuple[int, int]:
        """Rows and columns; a sequence stands upright, one token a row."""
        if not self.needs_grid:
            return query.shape[2], 1
        grid = context.require_grid(self.name, query.shape[2])
        if grid.frames > 1:
            raise OperatorError(
                f"hyena_x: layout 2d mixes one image, and the grid is {grid}. "
                "Choose causal_1d or centered_1d for videos."
            )
        return grid.height, grid.width

    def _upright(self, convolution: nn.Conv2d) -> torch.Tensor:
        """Its weights [D, 1, rows, columns], as `_layout` lays tokens out."""
        return convolution.weight if self.needs_grid else convolution.weight.transpose(2, 3)

    def _convolved(self, convolution: nn.Conv2d, part: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[B, H, N, E] -> [B, D, height, width].

        Channels stay last in memory, also through padding: forward and backward take a third of the time on CPU.
        """
        image, weight = tokens_last(part, height, width), self._upright(convolution)
        (top, left), padding = self.before, self.before
        bottom, right = (size - 1 - before for size, before in zip(weight.shape[2:], self.before, strict=True))
        if (bottom, right) != self.before:
            image, padding = F.pad(image, (0, 0, left, right, top, bottom)), (0, 0)
        image = image.permute(0, 3, 1, 2)
        return F.conv2d(image, weight, convolution.bias, padding=padding, groups=convolution.groups)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """The definition: every tap by itself, on a padded copy."""
        height, width = self._layout(query, context)
        query, key, value = (
            by_taps(tokens_last(part, height, width), self._upright(convolution), convolution.bias, self.before)
            for convolution, part in zip(self.convolutions.values(), (query, key, value), strict=True)
        )
        return rearrange(query * key * value, "b y x (h e) -> b h (y x) e", e=self.site.head_width)

    def flops(self, tokens: int) -> int:
        """Three convolutions and two gates."""
        rows, columns = self.convolutions["query"].kernel_size
        return 6 * rows * columns * tokens * self.site.inner_width + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """The gates, which torch's counter does not see."""
        return 2 * tokens * self.site.inner_width
