"""Frechet distance between two sets of images, by the features of a classifier. Paper: arXiv 1706.08500, Eq. 6."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import GraftError


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [F] and covariance [F, F] of a set of features, in float64."""

    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> FeatureStatistics:
        """Return the statistics of features [n, F].

        Raises `GraftError` for fewer than two rows, or values that are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise GraftError(
                f"Statistics need features [n, F] of at least two images; got shape {tuple(features.shape)}."
            )
        if not features.isfinite().all():
            raise GraftError("Some features are not finite: check the images they were made from.")
        features = features.double()
        return cls(features.mean(0), torch.atleast_2d(features.T.cov()))


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Frechet distance of two Gaussians.

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), so only symmetric roots are computed.

    Raises `GraftError` for features of different widths.
    """
    if one.mean.shape != other.mean.shape:
        raise GraftError(f"Features of different widths cannot be compared: {len(one.mean)} and {len(other.mean)}.")
    means = (one.mean - other.mean).square().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    root_trace = torch.linalg.svdvals(_root(one.covariance) @ _root(other.covariance)).sum()
    distance = means + traces - 2 * root_trace
    # equal statistics come out a little below zero
    return max(0.0, distance.item())


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """Return the symmetric square root; tiny negative eigenvalues are rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
