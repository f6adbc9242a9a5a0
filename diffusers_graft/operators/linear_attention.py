"""Kernel attention without softmax: phi(q) (phi(k)^T v) / phi(q) sum phi(k), non-causal, linear in tokens.

Papers: Transformers are RNNs, arXiv 2006.16236, Eq. 6 (elu + 1); The Hedgehog and the Porcupine, arXiv 2402.04347
(learnable softmax features).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import GeometryError, UnknownNameError
from ..site import Context, Site
from .base import Mixer

FEATURE_MAPS = ("elu", "relu", "softmax")

# diffusers writes hidden tokens as -10000 in additive masks.
_HIDDEN = -1000.0


class LinearAttention(Mixer):
    """Sums in float32 whatever the inputs' precision; a mask may hide keys, the same for every query."""

    kinds = ("self_attention", "cross_attention")
    honours_mask = True
    paper = "Transformers are RNNs, arXiv 2006.16236"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings of the kernel.

        Attributes:
            feature_map: `elu` (elu + 1), `relu`, or `softmax` (a learnable map per head, then softmax of x and -x).
        """

        feature_map: str = "elu"

        def __post_init__(self):
            super().__post_init__()
            if self.feature_map not in FEATURE_MAPS:
                raise UnknownNameError("feature map of linear_attention", self.feature_map, FEATURE_MAPS)

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        self.feature_weight = None
        if config.feature_map == "softmax":
            one = torch.eye(site.head_width).expand(2, site.heads, -1, -1)  # of queries and of keys
            self.feature_weight = nn.Parameter(one.clone())

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        precise = torch.promote_types(query.dtype, torch.float32)
        query, key = self._features(query, 0).to(precise), self._features(key, 1).to(precise)
        if context.mask is not None:
            key = key * visible_keys(context.mask, key)
        mixed = query @ (key.transpose(-1, -2) @ value.to(precise))
        weight = query @ key.sum(-2, keepdim=True).transpose(-1, -2)
        return (mixed / weight.clamp(min=1e-6)).to(value.dtype)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """The definition: all N x M weights, normalised row by row."""
        weights = self._features(query, 0) @ self._features(key, 1).transpose(-1, -2)
        if context.mask is not None:
            weights = weights * visible_keys(context.mask, key).transpose(-1, -2)
        return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)) @ value

    def _features(self, tensor: torch.Tensor, which: int) -> torch.Tensor:
        if self.config.feature_map == "elu":
            return F.elu(tensor) + 1
        if self.config.feature_map == "relu":
            return F.relu(tensor) + 1e-3
        mapped = tensor @ self.feature_weight[which]
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)

    def flops(self, tokens: int) -> int:
        """Two products with the [features, E] state and one with its normaliser; learnable maps where there are any."""
        features = self.site.head_width * (2 if self.feature_weight is not None else 1)
        maps = 4 * tokens * self.site.inner_width * self.site.head_width if self.feature_weight is not None else 0
        return maps + tokens * self.site.heads * (4 * features * self.site.head_width + 2 * features)


def visible_keys(mask: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask as a factor on keys, [B, 1 or H, M, 1]. Raises `GeometryError` where it differs from query to query."""
    visible = mask if mask.dtype == torch.bool else mask > _HIDDEN
    first = visible[..., :1, :]
    if not torch.compiler.is_compiling() and not torch.equal(visible, first.expand_as(visible)):
        raise GeometryError("linear_attention sums keys once for all queries, so a mask must hide the same keys from each.")
    return first.transpose(-1, -2).to(key.dtype)
