"""Softmax attention over keys and values that a strided convolution has compressed: N queries, N / stride^2 keys.

Paper: PixArt-Sigma, arXiv 2403.04692, Eq. 2 (KV token compression; the convolution starts as an average). Without the
LayerNorm that its code puts behind the convolution, which no pretrained attention could start from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context
from ..core.sites import Site
from ..errors import GeometryError, OperatorError
from .base import Mixer
from .ops.depthwise import tokens_last


class PooledKeys(Mixer):
    """Where the grid does not divide, its last row and column are repeated; a video is pooled frame by frame."""

    needs_grid = True
    paper = "PixArt-Sigma, arXiv 2403.04692"
    start = "projections keep their pretrained weights; keys and values start as averages of stride x stride tokens"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings of the compression.

        Attributes:
            stride: side of the square of tokens that become one.
        """

        stride: int = 2

        def __post_init__(self):
            super().__post_init__()
            if type(self.stride) is not int or self.stride < 1:
                raise OperatorError(f"pooled_keys: stride counts tokens from 1; got {self.stride!r}. Try 2.")

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        width, stride = site.inner_width, config.stride
        # No bias for keys: one vector added to all of them changes no softmax.
        self.convolutions = nn.ModuleDict(
            {
                name: nn.Conv2d(width, width, stride, stride, groups=width, bias=name == "value")
                for name in ("key", "value")
            }
        )

    @torch.no_grad()
    def init_from(self, original: nn.Module) -> None:
        for convolution in self.convolutions.values():
            convolution.weight.fill_(self.config.stride**-2)
        self.convolutions["value"].bias.zero_()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        key, value = (self._pooled(name, part, context) for name, part in (("key", key), ("value", value)))
        return F.scaled_dot_product_attention(query, key, value, scale=context.scale)

    def _pooled(self, name: str, part: torch.Tensor, context: Context) -> torch.Tensor:
        """[B, H, N, E] -> [B, H, M, E]."""
        grid, stride = context.require_grid(self.name, part.shape[2]), self.config.stride
        if stride > max(grid.height, grid.width):
            raise GeometryError(
                f"pooled_keys: stride {stride} is beyond the grid, which is {grid}. Choose a smaller one."
            )
        _, heads, _, width = part.shape
        image = tokens_last(part, grid.height, grid.width).permute(0, 3, 1, 2)
        right, below = -grid.width % stride, -grid.height % stride
        if right or below:
            image = F.pad(image, (0, right, 0, below), mode="replicate").contiguous(memory_format=torch.channels_last)
        pooled = self.convolutions[name](image).permute(0, 2, 3, 1)
        return pooled.unflatten(0, (-1, grid.frames)).flatten(1, 3).unflatten(2, (heads, width)).transpose(1, 2)

    def flops(self, tokens: int) -> int:
        """Softmax over the pooled keys, and two convolutions; of the last forward's grid, or of one that the stride
        divides.
        """
        grid, stride = self.last_grid(tokens), self.config.stride
        keys = grid.frames * -(-grid.height // stride) * -(-grid.width // stride) if grid else tokens // stride**2
        return 4 * keys * (tokens + stride**2) * self.site.inner_width
