"""Inception score, from the answers of a classifier alone. Paper: arXiv 1606.03498."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...errors import GraftError
from .base import FeatureMetric
from .extractors import LOGITS


@dataclass(frozen=True, kw_only=True)
class InceptionScore(FeatureMetric):
    """exp E KL(p(y|x) || p(y)), averaged over splits of the samples in their order, as ADM's evaluator does.

    Attributes:
        extractor: gives logits [B, K].
        split_size: samples of a split; the rest is a split of its own.
    """

    output: ClassVar[str] = LOGITS

    split_size: int = 5000

    def __post_init__(self):
        if self.split_size < 1:
            raise GraftError(f"A split has 1 sample or more; got split_size={self.split_size}.")

    def compute(self, features: torch.Tensor) -> dict[str, float]:
        scores = []
        for logits in features.double().split(self.split_size):
            answers = logits.log_softmax(1)
            # The mean of probabilities, as a logarithm.
            marginal = answers.exp().mean(0).log()
            divergence = (answers.exp() * (answers - marginal)).sum(1).mean()
            scores.append(divergence.exp())
        return {"inception_score": torch.stack(scores).mean().item()}

    def check(self, conditions: Sequence[Any]) -> None:
        super().check(conditions)
        if len(conditions) < 2:
            raise GraftError("The Inception score of one sample is always 1. Draw more.")
