"""Settings of stage one."""

import pytest

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError, UnknownNameError

from ..runs import HYENA, run_distill


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patience": 0}, "Counts"),
        ({"patience": 1.5}, "Counts"),
        ({"reuse": 1.5}, "Counts"),
        ({"memory": -5}, "Counts"),
        ({"ring": "a"}, "Counts"),
        ({"seed": 1.5}, "a seed are whole numbers"),
        ({"lr": float("inf")}, "positive learning rate"),
        ({"lr_scale": "x"}, "Factors"),
        ({"lr_scale": {"self_attention[1]": "x"}}, "Factors"),
        ({"closed_form": True}, "ClosedFormConfig"),
    ],
)
def test_settings_without_meaning_are_refused(settings, words):
    with pytest.raises(TrainingError, match=words):
        dg.DistillConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": {"self_attention[0]": "l3"}},
        {"mode": "backwards"},
        {"precision": "fp8"},
        {"optimizer": "Adam W"},
        {"schedule": "sine"},
    ],
    ids=str,
)
def test_unknown_names_are_refused_with_those_there_are(settings):
    with pytest.raises(UnknownNameError, match="Available"):
        dg.DistillConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 2.5},
        {"lr": "1e-4"},
        {"warmup": -5},
        {"max_grad_norm": -1.0},
        {"max_grad_norm": float("nan")},
        {"prompt_dropout": 7},
        {"lr": float("nan")},
        {"schedule": "piecewise_constant"},
        {"schedule_args": {"typo": 1}},
        {"schedule": "polynomial", "lr": 1e-8},
    ],
    ids=str,
)
def test_impossible_numbers_are_refused(settings):
    with pytest.raises(TrainingError, match=r"got DistillConfig|does not take these settings"):
        dg.DistillConfig(**settings)


def test_settings_that_torch_refuses_are_refused_in_words():
    with pytest.raises(TrainingError, match="does not take these settings"):
        run_distill({"self_attention[0]": HYENA}, optimizer_args={"betas": (0.9,)})
    with pytest.raises(TrainingError, match="choose one of them"):
        dg.DistillConfig(reuse=2, mode="sequential")
    with pytest.raises(TrainingError, match="does not take these settings"):
        run_distill({"self_attention[0]": HYENA}, optimizer_args={"momentum": 2})
