"""What metrics of drawn samples have in common, and the features that several of them share.

A metric is a frozen dataclass: its fields are its settings, which become part of the protocol. `check` runs before the
first sample is drawn. Metrics of features compare distributions; metrics of pictures give every picture a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import GraftError
from .extractors import FEATURES, describe_network
from .frechet_distance import FeatureStatistics
from .inception import open_inception


class SampleMetric:
    """Base of metrics of drawn samples; `dg.evaluate` draws them."""

    needs_teacher: ClassVar[bool] = False

    def check(self, conditions: Sequence[Any]) -> None:
        """Raise before anything is drawn, where samples for these conditions could not be measured."""

    def protocol(self) -> dict[str, Any]:
        """Return the settings by name, networks described by their class and weights."""
        settings = {}
        for field in fields(self):  # pyright: ignore[reportArgumentType]  # every metric is a dataclass
            value = getattr(self, field.name)
            settings[field.name] = describe_network(value) if isinstance(value, nn.Module) else value
        return {name: value for name, value in settings.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class FeatureMetric(SampleMetric):
    """Base of metrics that compare features of all samples, by default those of the Inception network of FID.

    Attributes:
        extractor: any module from images [B, C, H, W] in [0, 1] to features [B, F], or to several of them by name.
    """

    output: ClassVar[str] = FEATURES
    # What `compute` takes: statistics are gathered batch by batch, features are kept for all samples.
    takes_statistics: ClassVar[bool] = False

    extractor: nn.Module | None = None

    def open_extractor(self) -> nn.Module:
        """Return the extractor. Raises `MissingDependencyError` or `FileError` where the default one cannot be had."""
        # Not `self.extractor or ...`: a network may have a length, and be empty.
        if self.extractor is not None:
            return self.extractor
        return open_inception()

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "extractor": describe_network(self.open_extractor())}

    def check(self, conditions: Sequence[Any]) -> None:
        self.open_extractor()

    def check_features(self, features: torch.Tensor) -> None:
        """Raise for features of the first samples [n, F] that cannot be compared."""

    def compute(self, features: Any) -> dict[str, float]:
        """Return values by name, from features [N, F] or, where `takes_statistics`, from `FeatureStatistics`."""
        raise GraftError(f"{type(self).__name__} computes nothing.")


class PictureMetric(SampleMetric):
    """Base of metrics that give every picture numbers of its own; the score is their mean."""

    def measure(
        self, pictures: torch.Tensor, conditions: Sequence[Any], teacher_pictures: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return numbers [B] by name.

        Args:
            pictures: [B, C, H, W] in [0, 1].
            conditions: what each was drawn for.
            teacher_pictures: the teacher's for the same conditions and seeds, where `needs_teacher`.
        """
        raise GraftError(f"{type(self).__name__} measures nothing.")

    def summarize(self, numbers: dict[str, torch.Tensor], conditions: Sequence[Any]) -> dict[str, float]:
        """Return the scores from the numbers [N] of all pictures."""
        return {name: values.double().mean().item() for name, values in numbers.items()}


def require_enough(statistics: FeatureStatistics, samples: int, name: str, allow_singular: bool) -> None:
    """Raise `GraftError` for fewer samples than a covariance of such features needs to have full rank."""
    width = len(statistics.mean)
    # A covariance of fewer samples has directions without any spread, which count as distance.
    if samples <= width and not allow_singular:
        raise GraftError(
            f"{name} needs the covariance of {width:,} features, which {samples:,} samples cannot give: it takes more "
            f"than {width:,}. Draw more, use KID or CMMD, or say allow_singular=True to compare such numbers with "
            "each other alone."
        )
