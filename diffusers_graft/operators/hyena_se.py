"""Gated short convolutions with one in between: y = q * conv(k * v), q, k and v each after a depthwise convolution.

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, section 3 (Hyena-SE, K = 4, causal; the
inner filter starts as the identity).
"""

from __future__ import annotations

from .ops.gated_convolution import GatedConvolution


class HyenaSe(GatedConvolution):
    """The widest of the family: two convolutions deep."""

    start = (
        "projections keep their pretrained weights; both gates start open (one) and the inner filter as the "
        "identity, so that values pass unmixed"
    )
