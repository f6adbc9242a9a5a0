"""Softmax attention over all tokens: the self-graft, control of every other operator.

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, Table 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..core.context import Context
from ..core.sites import Site
from ..errors import OperatorError
from .base import Mixer


class SelfAttention(Mixer):
    """`softmax(q k^T / sqrt(E)) v`; with shared weights and the original's heads bit-identical to what it replaces."""

    kinds = ("self_attention", "cross_attention")
    honours_mask = honours_causal = True
    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings.

        Attributes:
            heads: how many heads share the width; None means as many as in the replaced attention.
        """

        heads: int | None = None

        def __post_init__(self):
            super().__post_init__()
            if self.heads is not None and (type(self.heads) is not int or self.heads < 1):
                raise OperatorError(
                    f"self_attention: heads is a count from 1, or None for the original's; got {self.heads!r}."
                )

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        self.heads = config.heads or site.heads
        self.honours_others = self.heads == site.heads
        if site.inner_width % self.heads:
            fitting = [heads for heads in range(1, site.inner_width + 1) if site.inner_width % heads == 0]
            raise OperatorError(
                f"self_attention: {self.heads} heads do not divide the width of {site.path}, which is {site.inner_width}. "
                f"Choose one of {', '.join(map(str, fitting))}."
            )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        query, key, value = (self._split(part, self.heads) for part in (query, key, value))
        if context.mask is not None and context.mask.dim() == 4 and context.mask.shape[1] not in (1, self.heads):
            raise OperatorError(
                f"self_attention has {self.heads} heads here, and the mask is for {context.mask.shape[1]}."
            )
        scale = context.scale if context.scale is None else context.scale * (self.heads / self.site.heads) ** 0.5
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=context.mask, scale=scale, is_causal=context.causal
        )
        return self._split(mixed, self.site.heads)

    def _split(self, part: torch.Tensor, heads: int) -> torch.Tensor:
        """[B, H, N, E] with the same width in other heads; untouched where they are those."""
        if part.shape[1] == heads:
            return part
        return part.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)

    def flops(self, tokens: int) -> int:
        return 4 * tokens * tokens * self.site.inner_width
