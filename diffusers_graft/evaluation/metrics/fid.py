"""FID, the Frechet distance of Inception's pooled features. Paper: arXiv 1706.08500."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import require_enough
from .frechet_distance import FeatureStatistics, frechet_distance
from .reference import ReferenceMetric


@dataclass(frozen=True, kw_only=True)
class FID(ReferenceMetric):
    """Frechet distance to a reference set. FIDs of fewer samples are larger, and compare with their like alone.

    Attributes:
        allow_singular: measure with fewer samples than features, which gives no full covariance.
    """

    name: ClassVar[str] = "fid"
    takes_statistics: ClassVar[bool] = True

    allow_singular: bool = False

    def check(self, conditions: Sequence[Any]) -> None:
        # Opens the reference as well, so that one that is missing shows now.
        require_enough(self._reference_statistics(), len(conditions), type(self).__name__, self.allow_singular)

    def reference_width(self) -> int:
        return len(self._reference_statistics().mean)

    def compute(self, features: FeatureStatistics) -> dict[str, float]:
        return {self.name: frechet_distance(features, self._reference_statistics())}

    def _reference_statistics(self) -> FeatureStatistics:
        return self.open_reference().statistics(self.open_extractor(), self.output)
