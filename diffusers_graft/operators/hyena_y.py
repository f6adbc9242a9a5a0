"""Gated short convolution without featurisers: y = q * conv(k * v).

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, section 3 (Hyena-Y, K = 4, causal; the
inner filter starts as the identity).
"""

from __future__ import annotations

from .ops.gated_convolution import GatedConvolution


class HyenaY(GatedConvolution):
    """The smallest of the family: one convolution, of keys times values."""

    has_featurisers = False
    start = "projections keep their pretrained weights; the inner filter starts as the identity, so that y = q * k * v"
