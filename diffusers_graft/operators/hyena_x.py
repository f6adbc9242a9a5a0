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
            if not isinstance(self.kernel_size, int) or self.kernel_size < 1:
                raise OperatorError(f"hyena_x: kernel_size counts taps from 1; got {self.kernel_size!r}.")

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        width, size = site.inner_width, config.kernel_size
        self.needs_grid, self.causal_operator = config.layout == "2d", config.layout == "causal_1d"
        taps = (size, size) if self.needs_grid else (1, size)
        before = size - 1 if self.causal_operator else size // 2
        self.before = tuple(before if n > 1 else 0 for n in taps)
        self.convolutions = nn.ModuleDict(
            {name: nn.Conv2d(width, width, taps, groups=width) for name in ("query", "key", "value")}
        )

    @torch.no_grad()
    def init_from(self, original: nn.Module) -> None:
        for name, convolution in self.convolutions.items():
            convolution.weight.zero_()
            convolution.bias.fill_(0.0 if name == "value" else 1.0)
        self.convolutions["value"].weight[:, :, self.before[0], self.before[1]] = 1.0

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        height, width = 1, query.shape[2]
        if self.needs_grid:
            grid = context.require_grid(self.name, query.shape[2])
            height, width = grid.frames * grid.height, grid.width
            if grid.frames > 1:
                raise OperatorError("hyena_x: layout 2d mixes one image; videos need causal_1d or centered_1d.")
        parts = zip(self.convolutions.values(), (query, key, value), strict=True)
        query, key, value = (self._convolved(convolution, part, height, width) for convolution, part in parts)
        return rearrange(query * key * value, "b (h e) y x -> b h (y x) e", e=self.site.head_width)

    def _convolved(self, convolution: nn.Conv2d, part: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[B, H, N, E] -> [B, D, height, width]; channels stay last in memory, which is several times faster on CPU."""
        image = part.transpose(1, 2).reshape(part.shape[0], height, width, -1).permute(0, 3, 1, 2)
        after = tuple(size - 1 - before for size, before in zip(convolution.kernel_size, self.before, strict=True))
        padding = self.before
        if after != self.before:
            (top, left), (bottom, right), padding = self.before, after, (0, 0)
            image = F.pad(image, (left, right, top, bottom))
        return F.conv2d(image, convolution.weight, convolution.bias, padding=padding, groups=convolution.groups)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """The definition: every tap by itself, on a padded copy."""
        grid = context.grid if self.needs_grid else None
        height, width = (grid.height, grid.width) if grid else (1, query.shape[2])
        mixed = 1
        for convolution, part in zip(self.convolutions.values(), (query, key, value), strict=True):
            rows, columns = convolution.kernel_size
            image = rearrange(part, "b h (y x) e -> b (h e) y x", y=height)
            (top, left), total = self.before, convolution.bias[:, None, None]
            padded = F.pad(image, (left, columns - 1 - left, top, rows - 1 - top))
            for y in range(rows):
                for x in range(columns):
                    taps = convolution.weight[:, 0, y, x][:, None, None]
                    total = total + taps * padded[:, :, y : y + height, x : x + width]
            mixed = mixed * total
        return rearrange(mixed, "b (h e) y x -> b h (y x) e", e=self.site.head_width)

    def flops(self, tokens: int) -> int:
        """Three convolutions and two gates."""
        rows, columns = self.convolutions["query"].kernel_size
        return 6 * rows * columns * tokens * self.site.inner_width + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """The gates, which torch's counter does not see."""
        return 2 * tokens * self.site.inner_width
