"""CMMD, the kernel distance of CLIP's image embeddings. Paper: arXiv 2401.09603."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import GraftError
from ..transformers_models import open_clip
from .reference import ReferenceMetric

_SCALE = 1000
_SIGMA = 10
_ROWS = 2000


@dataclass(frozen=True, kw_only=True)
class CMMD(ReferenceMetric):
    """Squared maximum mean discrepancy of unit embeddings with a Gaussian kernel of width 10, times 1,000.

    It needs few samples, and no Gaussian assumption. The default embeddings are those of CLIP ViT-L/14, 336 pixels.
    """

    def open_extractor(self) -> nn.Module:
        if self.extractor is not None:
            return self.extractor
        return open_clip("openai/clip-vit-large-patch14-336")

    def check(self, conditions: Sequence[Any]) -> None:
        if min(len(conditions), len(self.reference_features())) < 2:
            raise GraftError("CMMD compares at least two images with two others.")

    def compute(self, features: torch.Tensor) -> dict[str, float]:
        one = F.normalize(features.double(), dim=1)
        other = F.normalize(self.reference_features().double(), dim=1)
        distance = mean_kernel(one, one) + mean_kernel(other, other) - 2 * mean_kernel(one, other)
        return {"cmmd": _SCALE * distance}


def mean_kernel(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean of exp(-|x - y|^2 / (2 sigma^2)) over all pairs of [N, F] and [M, F], in blocks of rows."""
    # All pairs of 50,000 images would not fit into memory.
    total = 0.0
    for rows in one.split(_ROWS):
        squares = rows.square().sum(1)[:, None] + other.square().sum(1) - 2 * rows @ other.T
        total += torch.exp(-squares / (2 * _SIGMA**2)).sum().item()
    return total / (len(one) * len(other))
