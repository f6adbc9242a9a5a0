"""Softmax attention over all tokens: the self-graft, control of every other operator.

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, Table 2.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ..site import Context
from .base import Mixer


class SelfAttention(Mixer):
    """`softmax(q k^T / sqrt(E)) v`; with shared weights bit-identical to what it replaces."""

    kinds = ("self_attention", "cross_attention")
    honours_mask = honours_causal = True
    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=context.mask, scale=context.scale, is_causal=context.causal
        )

    def flops(self, tokens: int) -> int:
        return 4 * tokens * tokens * self.site.inner_width
