"""Softmax attention in a band of the raster order: each token sees `window` tokens before and after it.

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, Table 4 (SWA, w = 4, bidirectional).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import OperatorError
from ..site import Context, Grid, Site
from ._tiles import dense_attention, tiled_attention
from .base import Mixer


class SlidingWindow(Mixer):
    """Needs no grid, so it also serves sequences; on images it never reaches the token above or below."""

    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings of the band.

        Attributes:
            window: tokens seen before and after each token.
        """

        window: tuple[int, int] = (4, 4)

        def __post_init__(self):
            super().__post_init__()
            sound = isinstance(self.window, tuple) and len(self.window) == 2
            if not sound or not all(type(side) is int and side >= 0 for side in self.window):
                raise OperatorError(
                    f"sliding_window: window is (before, after), two counts of tokens; got {self.window!r}. Try (4, 4)."
                )

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        self.causal_operator = config.window[1] == 0

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        axes = ((query.shape[2], *self.config.window),)
        tile = max(32, *self.config.window)
        return tiled_attention(query, key, value, band, axes, tile=tile, scale=context.scale)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """The definition: softmax over all tokens under a band mask."""
        return dense_attention(query, key, value, band, ((query.shape[2], *self.config.window),), scale=context.scale)

    def receptive_field(self, token: int, grid: Grid) -> range:
        return band(grid.tokens, *self.config.window)[token]

    def flops(self, tokens: int) -> int:
        return 4 * self._seen(tokens) * self.site.inner_width

    def uncounted_flops(self, tokens: int) -> int:
        """Minus the pairs that the reference computes and its mask hides."""
        return -4 * (tokens**2 - self._seen(tokens)) * self.site.inner_width

    countable = reference

    def _seen(self, tokens: int) -> int:
        return sum(map(len, band(tokens, *self.config.window)))


def band(length: int, before: int, after: int) -> list[range]:
    """The places each place of a sequence sees; the band is cut off at both ends."""
    return [range(max(0, i - before), min(length, i + after + 1)) for i in range(length)]
