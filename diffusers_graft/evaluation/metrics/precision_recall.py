"""Improved precision and recall by nearest neighbours. Paper: arXiv 1904.06991."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import GraftError
from .reference import ReferenceMetric

_ROWS = 2000  # distances of so many images to all others are in memory


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall(ReferenceMetric):
    """Share of samples that lie among reference images, and share of reference images that lie among samples.

    Attributes:
        neighbours: a point lies among others if it is as near to one of them as that one's k-th neighbour.
    """

    neighbours: int = 3

    def check(self, conditions: Sequence[Any]) -> None:
        fewest = min(len(conditions), len(self.reference_features()))
        if not 1 <= self.neighbours < fewest:
            raise GraftError(f"Of {fewest} images each has {fewest - 1} neighbours; got neighbours={self.neighbours}.")

    def compute(self, features: torch.Tensor) -> dict[str, float]:
        reference = self.reference_features()
        precision = share_among(features, reference, self.neighbours)
        recall = share_among(reference, features, self.neighbours)
        return {"precision": precision, "recall": recall}


def share_among(points: torch.Tensor, others: torch.Tensor, neighbours: int) -> float:
    """Return the share of points [N, F] within the distance of some other one [M, F] to its k-th neighbour."""
    radii = []
    for rows in others.split(_ROWS):
        # The nearest is the point itself.
        radii.append(torch.cdist(rows, others).kthvalue(neighbours + 1).values)
    radius = torch.cat(radii)
    inside = [(torch.cdist(rows, others) <= radius).any(1) for rows in points.split(_ROWS)]
    return torch.cat(inside).double().mean().item()
