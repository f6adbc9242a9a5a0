"""Losses of stage one."""

import pytest
import torch

from diffusers_graft.training.distill.losses import LOSSES, relative_l2

from ..runs import HYENA, run_distill


def test_relative_l2_is_scale_free_and_splits_over_samples():
    wanted, answer = torch.randn(2, 4, 5, 3)
    assert relative_l2(7 * answer, 7 * wanted) == pytest.approx(relative_l2(answer, wanted).item(), rel=1e-5)
    halves = [relative_l2(a, w).item() for a, w in zip(answer.split(2), wanted.split(2), strict=True)]
    assert relative_l2(answer, wanted).item() == pytest.approx(sum(halves) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(loss):
    _, _, reports = run_distill({"self_attention[1]": HYENA}, steps=60, lr=5e-3, loss=loss)
    (report,) = reports.values()
    assert sum(report.losses[-10:]) < 0.8 * sum(report.losses[:10])
