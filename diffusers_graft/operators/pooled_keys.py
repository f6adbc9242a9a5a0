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
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import GeometryError
from .base import Mixer
from .ops.depthwise import tokens_last
from .ops.settings import require_count


class PooledKeys(Mixer):
    """Softmax over pooled keys and values, one for stride x stride tokens; a video is pooled frame by frame.

    Where the grid does not divide, its last row and column are repeated. A prompt's keys are not pooled: queries see
    them beside the pooled ones, in one softmax.
    """

    needs_grid = True
    honours_others = True
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
            mask = _mask_others(context.mask, tokens, pooled_key.shape[2])
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
        _, heads, _, width = part.shape
        image = tokens_last(part, grid.height, grid.width).permute(0, 3, 1, 2)
        right = -grid.width % stride
        below = -grid.height % stride
        if right or below:
            image = F.pad(image, (0, right, 0, below), mode="replicate").contiguous(memory_format=torch.channels_last)
        pooled = self.convolutions[name](image).permute(0, 2, 3, 1)
        tokens_first = pooled.unflatten(0, (-1, grid.frames)).flatten(1, 3)
        return tokens_first.unflatten(2, (heads, width)).transpose(1, 2)

    def flops(self, tokens: int) -> int:
        """Price softmax over the pooled keys and two convolutions, on the last forward's grid or one that divides."""
        grid = self.last_grid(tokens)
        stride = self.config.stride
        keys = tokens // stride**2
        if grid is not None:
            keys = grid.frames * -(-grid.height // stride) * -(-grid.width // stride)
        return 4 * keys * (tokens + stride**2) * self.site.inner_width


def _mask_others(mask: torch.Tensor | None, tokens: int, pooled: int) -> torch.Tensor | None:
    """Return the mask of a prompt's keys behind that of the image's pooled keys, which are never hidden."""
    if mask is None:
        return None
    visible = True if mask.dtype == torch.bool else 0.0
    return F.pad(mask[..., tokens:], (pooled, 0), value=visible)
