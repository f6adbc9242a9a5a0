"""KID, the kernel distance of Inception's features. Paper: arXiv 1801.01401."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import GraftError
from .reference import ReferenceMetric


@dataclass(frozen=True, kw_only=True)
class KID(ReferenceMetric):
    """Squared maximum mean discrepancy with the kernel (x y / F + 1)^3, unbiased, as a mean over random subsets.

    Attributes:
        subsets, subset_size: how many subsets of how many images.
        seed: of the subsets.
    """

    subsets: int = 100
    subset_size: int = 1000
    seed: int = 0

    def check(self, conditions: Sequence[Any]) -> None:
        fewest = min(len(conditions), len(self.reference_features()))
        if not 2 <= self.subset_size <= fewest or self.subsets < 1:
            raise GraftError(
                f"KID takes subsets of at least 2 and at most {fewest:,} images here; got subset_size="
                f"{self.subset_size}, subsets={self.subsets}. Draw more samples, or take smaller subsets."
            )

    def compute(self, features: torch.Tensor) -> dict[str, float]:
        reference = self.reference_features()
        generator = torch.Generator().manual_seed(self.seed)
        distances = []
        for _ in range(self.subsets):
            # Without replacement: a point that is there twice would look like agreement.
            chosen = torch.randperm(len(features), generator=generator)[: self.subset_size]
            others = torch.randperm(len(reference), generator=generator)[: self.subset_size]
            distances.append(kernel_distance(features[chosen].double(), reference[others].double()))
        values = torch.stack(distances)
        return {"kid": values.mean().item(), "kid_std": values.std(correction=0).item()}


def kernel_distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the unbiased squared discrepancy of features [n, F] and [n, F]; it may lie below zero."""
    within = 0.0
    for features in (one, other):
        # A point and itself are no pair, which is what makes the estimate unbiased.
        kernel = _kernel(features, features)
        count = len(features)
        within += (kernel.sum() - kernel.trace()) / (count * (count - 1))
    return within - 2 * _kernel(one, other).mean()


def _kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one @ other.T / one.shape[1] + 1) ** 3
