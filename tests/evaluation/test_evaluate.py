"""Scores of models, with the protocol that made them."""

from dataclasses import dataclass
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError

from ..models import SCHEDULER, batches, tiny_dit

LIBRARIES = ("torch", "diffusers", "transformers", "diffusers-graft")


@dataclass
class Answer:
    samples: int = 7

    def __call__(self, model):
        return {"answer": 42.0}


def test_scores_as_data():
    scores = dg.evaluate(tiny_dit(), batches(1), noise_scheduler=SCHEDULER, metrics=[Answer()])
    assert scores["answer"] == 42
    assert set(scores.to_dict()) == {"values", "protocol"}
    numerics = {"dtype": "float32", "tf32": "off"}
    versions = {name.replace("-", "_"): version(name).partition("+")[0] for name in LIBRARIES}
    measured = {"samples": 8, "seed": 0, "noise_scheduler": "DDPMScheduler", "Answer.samples": 7}
    assert scores.protocol == {**measured, **numerics, **versions}
    assert "answer 42" in str(scores)


def test_the_denoising_loss_is_the_mean_over_samples():
    model = tiny_dit()
    inputs = {"hidden_states": torch.randn(3, 1, 8, 8), "timestep": torch.arange(3), "class_labels": torch.arange(3)}
    batch = {**inputs, "target": torch.randn(3, 1, 8, 8)}
    scores = dg.evaluate(
        model, [{name: value[some] for name, value in batch.items()} for some in (slice(0, 1), slice(1, 3))]
    )
    with torch.no_grad():
        assert scores["denoising_loss"] == pytest.approx(F.mse_loss(model(**inputs).sample, batch["target"]).item())
    assert scores.protocol["samples"] == 3
    assert "noise_scheduler" not in scores.protocol


@pytest.mark.parametrize("measure", [dg.evaluate, dg.analyze])
def test_labels_are_not_dropped_while_a_model_is_measured(measure):
    model, (batch,), seen = tiny_dit(), batches(1, size=64), {}
    model.register_forward_pre_hook(lambda model, args, kwargs: seen.update(kwargs), with_kwargs=True)
    measure(model, [batch], noise_scheduler=SCHEDULER)
    assert torch.equal(seen["class_labels"], batch["class_labels"])


def test_evaluation_is_a_fixed_draw():
    model = tiny_dit()
    first, second = (dg.evaluate(model, batches(), noise_scheduler=SCHEDULER) for _ in range(2))
    assert first == second
    assert first.protocol["samples"] == 32
    with pytest.raises(TrainingError, match="no batches"):
        dg.evaluate(model, [], noise_scheduler=SCHEDULER)
