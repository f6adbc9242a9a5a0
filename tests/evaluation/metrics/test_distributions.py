"""Metrics of distributions against torchmetrics, torch-fidelity and direct computations, on the same features."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as TheirInceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from diffusers_graft.evaluation.metrics import CMMD, FID, KID, SFID, InceptionScore, PrecisionRecall, save_reference
from diffusers_graft.evaluation.metrics.frechet_distance import FeatureStatistics, RunningStatistics, frechet_distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")


class Flat(nn.Module):
    """Features are the pixels, so that both libraries see the same ones."""

    def forward(self, images):
        return images.flatten(1)


@pytest.fixture(scope="module")
def sets():
    """Two sets of 200 'images' [3, 2, 2], whose pixels are their 12 features."""
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(200, 3, 2, 2, generator=generator)
    fake = 0.8 * torch.rand(200, 3, 2, 2, generator=generator) + 0.1 * real + 0.05
    return real, fake


@pytest.fixture(scope="module")
def reference(sets, tmp_path_factory):
    return save_reference(tmp_path_factory.mktemp("reference") / "real.npz", sets[0].split(64), Flat())


def measured_by_torchmetrics(metric, sets):
    metric.set_dtype(torch.float64)
    for is_real, images in zip((True, False), sets, strict=True):
        metric.update(images, real=is_real)
    return metric.compute()


def statistics_in_batches(features: torch.Tensor, sizes: Sequence[int]):
    running = RunningStatistics()
    for batch in features.split(sizes):
        running.update(batch)
    return running.result()


def test_fid_is_that_of_torchmetrics(sets, reference):
    theirs = FrechetInceptionDistance(Flat(), normalize=True, input_img_size=(3, 2, 2))
    ours = FID(reference=reference, extractor=Flat()).compute(statistics_in_batches(sets[1].flatten(1), [3, 97, 100]))
    assert ours["fid"] == pytest.approx(measured_by_torchmetrics(theirs, sets).item(), rel=1e-3)


def test_kid_is_that_of_torchmetrics(sets, reference):
    theirs = KernelInceptionDistance(Flat(), subsets=1, subset_size=200, normalize=True)
    metric = KID(reference=reference, extractor=Flat(), subsets=3, subset_size=200)
    ours = metric.compute(sets[1].flatten(1))
    assert ours["kid"] == pytest.approx(measured_by_torchmetrics(theirs, sets)[0].item(), rel=1e-3)
    # All subsets are the whole set.
    assert ours["kid_std"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("split_size", [200, 50])
def test_the_inception_score_is_that_of_torchmetrics(sets, split_size, monkeypatch):
    logits = 6 * sets[1]
    # It shuffles, which ADM's evaluator does not.
    monkeypatch.setattr(torch, "randperm", lambda count: torch.arange(count))
    theirs = TheirInceptionScore(Flat(), splits=200 // split_size)
    theirs.update(logits)
    ours = InceptionScore(extractor=Flat(), split_size=split_size).compute(logits.flatten(1))
    assert ours["inception_score"] == pytest.approx(theirs.compute()[0].item(), rel=1e-3)


def test_precision_and_recall_are_those_of_torch_fidelity(sets, reference):
    library = pytest.importorskip("torch_fidelity.metric_prc")
    fake, real = sets[1].flatten(1), sets[0].flatten(1)
    precision, recall = library.calculate_precision_recall_full(fake, real)
    ours = PrecisionRecall(reference=reference, extractor=Flat()).compute(fake)
    assert ours == pytest.approx({"precision": precision, "recall": recall}, rel=1e-3)


def test_precision_and_recall_count_by_hand(sets, reference):
    def share(points, others, k=3):
        distances = np.linalg.norm(others[:, None] - others[None], axis=2)
        radius = np.sort(distances, axis=1)[:, k]
        return (np.linalg.norm(points[:, None] - others[None], axis=2) <= radius).any(1).mean()

    fake, real = sets[1].flatten(1).numpy().astype(float), sets[0].flatten(1).numpy().astype(float)
    ours = PrecisionRecall(reference=reference, extractor=Flat()).compute(sets[1].flatten(1))
    assert 0 < ours["precision"] < 1
    assert ours == pytest.approx({"precision": share(fake, real), "recall": share(real, fake)}, rel=1e-3)


def test_sfid_is_a_frechet_distance_of_spatial_features(sets, tmp_path):
    class Both(Flat):
        def forward(self, images):
            return {"features": images.mean((2, 3)), "spatial": images[:, :2].permute(0, 2, 3, 1).flatten(1)}

    real, fake = (images[:, :2].permute(0, 2, 3, 1).flatten(1).double().numpy() for images in sets)
    saved = save_reference(tmp_path / "real.npz", sets[0].split(64), Both())
    root = scipy.linalg.sqrtm(np.cov(fake, rowvar=False) @ np.cov(real, rowvar=False)).real
    expected = ((fake.mean(0) - real.mean(0)) ** 2).sum()
    expected += np.trace(np.cov(fake, rowvar=False) + np.cov(real, rowvar=False) - 2 * root)
    ours = SFID(reference=saved, extractor=Both()).compute(FeatureStatistics.of(torch.from_numpy(fake)))
    assert ours["sfid"] == pytest.approx(expected, rel=1e-3)


def test_cmmd_is_a_gaussian_kernel_over_all_pairs(sets, reference):
    real, fake = (images.flatten(1).double() / images.flatten(1).double().norm(dim=1, keepdim=True) for images in sets)

    def kernel(one, other):
        return torch.exp(-(torch.cdist(one, other) ** 2) / 200).mean().item()

    expected = 1000 * (kernel(real, real) + kernel(fake, fake) - 2 * kernel(real, fake))
    ours = CMMD(reference=reference, extractor=Flat()).compute(sets[1].flatten(1))
    assert ours["cmmd"] == pytest.approx(expected, rel=1e-3)


def test_a_set_is_at_no_distance_from_itself(sets, reference):
    features = sets[0].flatten(1)
    assert FID(reference=reference, extractor=Flat()).compute(FeatureStatistics.of(features))["fid"] < 1e-6
    assert CMMD(reference=reference, extractor=Flat()).compute(features)["cmmd"] == pytest.approx(0, abs=1e-6)
    same = PrecisionRecall(reference=reference, extractor=Flat()).compute(features)
    assert same == {"precision": 1.0, "recall": 1.0}


def test_known_gaussians_have_the_closed_form():
    """Of covariances that commute, the distance is |m1 - m2|^2 + sum (s1 - s2)^2."""
    one = FeatureStatistics(torch.tensor([1.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()))
    other = FeatureStatistics(torch.tensor([0.0, 2.0]).double(), torch.diag(torch.tensor([1.0, 25.0]).double()))
    assert frechet_distance(one, other) == pytest.approx(5 + 1 + 4, abs=1e-9)
    torch.manual_seed(0)
    drawn = MultivariateNormal(one.mean, one.covariance).sample((100_000,))
    assert frechet_distance(FeatureStatistics.of(drawn), other) == pytest.approx(10, rel=0.02)


def test_statistics_of_batches_are_those_of_all_also_far_from_zero():
    features = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    found = statistics_in_batches(features, [1, 2, 40, 57])
    assert torch.allclose(found.mean, features.mean(0), rtol=1e-12)
    assert torch.allclose(found.covariance, features.T.cov(), rtol=1e-6, atol=1e-8)


def test_the_inception_score_of_certain_answers_counts_the_classes():
    logits = 1000 * torch.eye(5).repeat(4, 1)
    assert InceptionScore(extractor=Flat()).compute(logits)["inception_score"] == pytest.approx(5)
    assert math.isclose(InceptionScore(extractor=Flat()).compute(torch.zeros(9, 5))["inception_score"], 1)
