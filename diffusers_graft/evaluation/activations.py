"""Statistics of activations, streamed: mean, variance, kurtosis and the channels with the largest values.

Paper: arXiv 2506.05340, Table 1: the variance of attention and MLP outputs grows with depth, and outliers hurt an L2
loss. Moments of groups are joined by the formulas of Pebay (2008), SAND2008-6212, so no activation is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.sites import Site
from ..errors import TrainingError
from .timestep_buckets import TimestepBuckets

# Channels that are listed with their largest value.
LISTED = 5


@dataclass(frozen=True)
class Moments:
    """Sums of powers of the distance from the mean, of a group of values.

    Attributes:
        count: values.
        mean: their mean.
        second, third, fourth: sums of the powers of their distances from it.
    """

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    @classmethod
    def of(cls, values: torch.Tensor) -> Moments:
        """Compute the moments of a tensor, in float64."""
        values = values.double()
        mean = values.mean()
        distances = values - mean
        squares = distances.square()
        third = (squares * distances).sum()
        return cls(values.numel(), mean.item(), squares.sum().item(), third.item(), squares.square().sum().item())

    def joined(self, other: Moments) -> Moments:
        """Return the moments of both groups together."""
        # An empty group would divide by zero.
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        share = self.count / count
        rest = other.count / count
        gap = other.mean - self.mean
        second = self.second + other.second + count * share * rest * gap**2
        third = self.third + other.third
        third += count * share * rest * (share - rest) * gap**3
        third += 3 * gap * (share * other.second - rest * self.second)
        fourth = self.fourth + other.fourth
        fourth += count * share * rest * (share**2 - share * rest + rest**2) * gap**4
        fourth += 6 * gap**2 * (share**2 * other.second + rest**2 * self.second)
        fourth += 4 * gap * (share * other.third - rest * self.third)
        return Moments(count, self.mean + rest * gap, second, third, fourth)

    @property
    def variance(self) -> float:
        """Mean square of the distance from the mean."""
        return self.second / self.count

    @property
    def kurtosis(self) -> float:
        """Fourth moment over the square of the second: 3 for a normal distribution; 0 where all values are equal."""
        if not self.second:
            return 0.0
        return self.count * self.fourth / self.second**2


class ActivationRecorder:
    """Forward hook that adds the output of one part to the statistics of each timestep bucket."""

    def __init__(self, site: Site, buckets: TimestepBuckets):
        self.site = site
        self.buckets = buckets
        self.moments = [Moments()] * buckets.count
        # The largest value of every channel, [D] a bucket; none before the first output.
        self.largest: list[torch.Tensor | None] = [None] * buckets.count

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Add one output: [B, N, D], or a tuple that begins with it."""
        while not isinstance(output, torch.Tensor):
            output = output[0]
        if output.dim() < 3:
            # Models that pack their samples into one sequence have no dimension for them.
            output = output[None]
        for sample, bucket in zip(output, self.buckets.of(len(output)), strict=True):
            moments = Moments.of(sample)
            if not math.isfinite(moments.fourth):
                raise TrainingError(
                    f"Values at {self.site.address} are not finite, so they have no statistics. Look at the batches, "
                    "and at the precision of the model."
                )
            self.moments[bucket] = self.moments[bucket].joined(moments)
            channels = sample.detach().float().abs().flatten(0, -2).amax(0)
            largest = self.largest[bucket]
            if largest is not None:
                channels = torch.maximum(largest, channels)
            self.largest[bucket] = channels

    def summary(self) -> list[dict[str, Any] | None]:
        """Return the statistics of every bucket, JSON-able; None for one that no sample was in."""
        rows: list[dict[str, Any] | None] = []
        for moments, largest in zip(self.moments, self.largest, strict=True):
            if largest is None:
                rows.append(None)
                continue
            values, channels = largest.topk(min(LISTED, len(largest)))
            row = {
                "count": moments.count,
                "mean": moments.mean,
                "variance": moments.variance,
                "kurtosis": moments.kurtosis,
                "largest": [list(pair) for pair in zip(values.tolist(), channels.tolist(), strict=True)],
            }
            rows.append(row)
        return rows
