"""Frechet distance between two sets of images, by the features of a classifier. Paper: arXiv 1706.08500, Eq. 6."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import GraftError, MismatchError


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
        running = RunningStatistics()
        running.update(features)
        return running.result()


class RunningStatistics:
    """Mean and covariance of features that come batch by batch, in float64; no batch is kept.

    Batches are merged by their means and sums of squares (Chan, Golub and LeVeque 1979), so that a mean far from zero
    costs no digits.
    """

    def __init__(self):
        self.count = 0
        self.mean = torch.zeros(0)
        self.squares = torch.zeros(0)

    def update(self, features: torch.Tensor) -> None:
        """Take in features [n, F]. Raises `GraftError` for another shape, and for values that are not finite."""
        if features.ndim != 2 or not len(features):
            raise GraftError(f"Statistics need features [n, F]; got shape {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise GraftError("Some features are not finite: check the images they were made from.")
        # Centred before it is squared: the square of a large mean would swallow the variance.
        batch = RunningStatistics()
        features = features.double()
        batch.count = len(features)
        batch.mean = features.mean(0)
        centred = features - batch.mean
        batch.squares = centred.T @ centred
        self.merge(batch)

    def merge(self, other: RunningStatistics) -> None:
        """Take in what another one saw. Raises `MismatchError` for features of another width."""
        if not self.count or not other.count:
            seen = other if other.count else self
            self.count = seen.count
            self.mean = seen.mean
            self.squares = seen.squares
            return
        _require_one_width(self.mean, other.mean)
        count = self.count + other.count
        difference = other.mean - self.mean
        between = torch.outer(difference, difference) * (self.count * other.count / count)
        self.squares = self.squares + other.squares + between
        self.mean = self.mean + difference * (other.count / count)
        self.count = count

    def result(self) -> FeatureStatistics:
        """Return the statistics. Raises `GraftError` for features of fewer than two images."""
        if self.count < 2:
            raise GraftError(f"Statistics need features of at least two images; got {self.count}.")
        return FeatureStatistics(self.mean, self.squares / (self.count - 1))


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Frechet distance of two Gaussians.

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), so only symmetric roots are computed.

    Raises `MismatchError` for features of different widths.
    """
    _require_one_width(one.mean, other.mean)
    means = (one.mean - other.mean).square().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    root_trace = torch.linalg.svdvals(_root(one.covariance) @ _root(other.covariance)).sum()
    distance = means + traces - 2 * root_trace
    # equal statistics come out a little below zero
    return max(0.0, distance.item())


def _require_one_width(one: torch.Tensor, other: torch.Tensor) -> None:
    if one.shape != other.shape:
        raise MismatchError(f"Features of different widths cannot be compared: {len(one)} and {len(other)}.")


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """Return the symmetric square root; tiny negative eigenvalues are rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
