"""Frechet distance against scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusers_graft.errors import GraftError
from diffusers_graft.evaluation.metrics.frechet_distance import FeatureStatistics, frechet_distance


@pytest.mark.parametrize(("n", "width"), [(50, 4), (30, 40), (500, 16), (9, 1)])
def test_frechet_distance_is_scipys(n, width):
    generator = torch.Generator().manual_seed(n)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    one = torch.randn(n, width, generator=generator, dtype=torch.float64)
    other = torch.randn(n, width, generator=generator, dtype=torch.float64) @ mixing + 0.3
    a, b = FeatureStatistics.of(one), FeatureStatistics.of(other)
    c1, c2 = (np.atleast_2d(np.cov(features.numpy(), rowvar=False)) for features in (one, other))
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum().item() + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("features", [torch.zeros(1, 4), torch.zeros(4), torch.full((4, 4), float("nan"))])
def test_features_without_statistics(features):
    with pytest.raises(GraftError):
        FeatureStatistics.of(features)


def test_two_images_have_statistics_in_float64():
    assert FeatureStatistics.of(torch.randn(2, 4)).covariance.dtype == torch.float64


def test_features_of_different_widths():
    with pytest.raises(GraftError, match="4 and 5"):
        frechet_distance(FeatureStatistics.of(torch.randn(9, 4)), FeatureStatistics.of(torch.randn(9, 5)))
