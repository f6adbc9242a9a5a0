"""Gated short convolutions: y = q * k * v, each after a depthwise convolution.

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, section 3 (Hyena-X, K = 4, causal).
"""

from __future__ import annotations

from .ops.gated_convolution import GatedConvolution


class HyenaX(GatedConvolution):
    """Hyena-SE without its inner convolution."""

    has_inner = False
    start = "projections keep their pretrained weights; both gates start open (one), so that values pass unmixed"
