"""Softmax attention over keys and values that a strided convolution has compressed: N queries, N / stride^2 keys.

Paper: PixArt-Sigma, arXiv 2403.04692, Eq. 2 (KV token compression; the convolution starts as an average). Without the
LayerNorm that its code puts behind the convolution, which no pretrained attention could start from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..core.context import Context
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import GeometryError
from .base import Mixer
from .ops.depthwise import count_pooled, pool_tokens
from .ops.masks import mask_others
from .ops.settings import require_count


class PooledKeys(Mixer):
    """Softmax over pooled keys and values, one for stride x stride tokens; a video is pooled frame by frame.

    Where the grid does not divide, its last row and column are repeated. A prompt's keys are not pooled: queries see
    them beside the pooled ones, in one softmax.
    """

    needs_grid = True
    honours_others = True
    exact_with = "stride 1"
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
            require_count("pooled_keys", "stride", self.stride, example=2)

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        width = site.inner_width
        stride = config.stride
        # No bias for keys: one vector added to all of them changes no softmax.
        self.convolutions = nn.ModuleDict(
            {
                "key": nn.Conv2d(width, width, stride, stride, groups=width, bias=False),
                "value": nn.Conv2d(width, width, stride, stride, groups=width),
            }
        )

    @torch.no_grad()
    def init_from(self, original: nn.Module) -> None:
        for convolution in self.convolutions.values():
            nn.init.constant_(convolution.get_parameter("weight"), self.config.stride**-2)
        nn.init.zeros_(self.convolutions["value"].get_parameter("bias"))

    def forward(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        tokens = query.shape[2]
        pooled_key = self._pool("key", key[:, :, :tokens], context)
        pooled_value = self._pool("value", value[:, :, :tokens], context)
        mask = None
        if key.shape[2] > tokens:
            mask = mask_others(context.mask, tokens, pooled_key.shape[2])
            pooled_key = torch.cat([pooled_key, key[:, :, tokens:]], dim=2)
            pooled_value = torch.cat([pooled_value, value[:, :, tokens:]], dim=2)
        return context.attend(query, pooled_key, pooled_value, mask=mask, scale=context.scale)

    def _pool(self, name: str, part: torch.Tensor, context: Context) -> torch.Tensor:
        """Pool [B, H, N, E] to [B, H, M, E]."""
        grid = context.require_grid(self.name, part.shape[2])
        stride = self.config.stride
        if stride > max(grid.height, grid.width):
            raise GeometryError(
                f"pooled_keys: stride {stride} is beyond the grid, which is {grid}. Choose a smaller one."
            )
        return pool_tokens(part, grid, stride, self.convolutions[name])

    def flops(self, tokens: int) -> int:
        """Price softmax over the pooled keys and two convolutions, on the last forward's grid or one that divides."""
        stride = self.config.stride
        keys = count_pooled(self.last_grid(tokens), tokens, stride)
        return 4 * keys * (tokens + stride**2) * self.site.inner_width
