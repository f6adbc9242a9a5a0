"""Softmax attention over all tokens: the self-graft, control of every other operator.

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, Table 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.context import Context
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import OperatorError
from .base import Mixer
from .ops.settings import require_count


class SelfAttention(Mixer):
    """`softmax(q k^T / sqrt(E)) v`; with shared weights and the original's heads bit-identical to what it replaces."""

    kinds = ("self_attention", "cross_attention")
    honours_mask = True
    honours_others = True
    honours_causal = True
    exact_with = "the heads of the original"
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
            if self.heads is not None:
                require_count("self_attention", "heads", self.heads, example=8)

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        self.heads = config.heads or site.heads
        # With other heads a prompt's tokens keep the attention they have.
        self.is_plain_softmax = self.heads == site.heads
        require_divided(self.name, self.heads, site)

    def forward(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        mask = context.mask
        if mask is not None:
            require_mask_of_heads(self.name, mask, self.heads)
        scale = context.scale
        if scale is not None:
            # A scale is given for the original's heads; narrower heads take a larger one.
            scale = scale * (self.heads / self.site.heads) ** 0.5
        query, key, value = (regroup_heads(part, self.heads) for part in (query, key, value))
        mixed = context.attend(query, key, value, mask=mask, scale=scale, causal=context.causal)
        return regroup_heads(mixed, self.site.heads)

    def flops(self, tokens: int) -> int:
        return 4 * tokens * tokens * self.site.inner_width


def require_divided(who: str, heads: int, site: AttentionSite) -> None:
    """Raise `OperatorError` where a number of heads does not divide the width of a site."""
    # Said here, since torch's error would name neither the site nor what fits.
    if site.inner_width % heads:
        fitting = [count for count in range(1, site.inner_width + 1) if site.inner_width % count == 0]
        raise OperatorError(
            f"{who}: {heads} heads do not divide the width of {site.path}, which is "
            f"{site.inner_width}. Choose one of {', '.join(map(str, fitting))}."
        )


def require_mask_of_heads(who: str, mask: torch.Tensor, heads: int) -> None:
    """Raise `OperatorError` for a mask of another number of heads."""
    if mask.dim() == 4 and mask.shape[1] not in (1, heads):
        raise OperatorError(f"{who} has {heads} heads here, and the mask is for {mask.shape[1]}.")


def regroup_heads(part: torch.Tensor, heads: int) -> torch.Tensor:
    """Split [B, H, N, E] into another number of heads; unchanged where the number is the same."""
    if part.shape[1] == heads:
        return part
    tokens_first = part.transpose(1, 2).flatten(2)
    return tokens_first.unflatten(2, (heads, -1)).transpose(1, 2)
