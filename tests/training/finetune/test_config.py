"""Settings of stage two."""

import pytest
from peft import LoraConfig

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError

from ...models import tiny_dit


def test_lora_alone_means_operators_and_lora():
    assert dg.FinetuneConfig(lora=LoraConfig(r=2)).train == "operators+lora"
    assert dg.FinetuneConfig().train == "all"


def test_the_average_by_length_covers_the_last_tenth():
    decays = [dg.FinetuneConfig(steps=steps, ema_decay="auto").average_decay for steps in (5, 500, 10**6)]
    assert decays == [0.0, 0.98, 0.9999]
    assert dg.FinetuneConfig(ema_decay=0.5).average_decay == 0.5


def test_the_usual_settings_follow_the_model():
    model = tiny_dit()
    width = model.inner_dim
    sites = dg.find_sites(model)
    config = dg.FinetuneConfig().for_model(model, sites)
    assert config.lr == pytest.approx(0.1 / width, rel=1e-2)
    assert (config.denoising, config.distill_output, config.distill_features) == (0.0, 1.0, 5.0)
    assert config.timesteps == "uniform"
    muon = dg.FinetuneConfig(optimizer="Muon", denoising=1.0).for_model(model, sites)
    assert muon.lr == pytest.approx(0.3 / width, rel=1e-2)
    assert muon.timesteps == "auto"
    assert dg.DistillConfig().for_model(model, sites).lr == pytest.approx(0.2 / width, rel=1e-2)
    given = dg.FinetuneConfig(lr=1e-2, distill_features=0.0)
    assert given.for_model(model, sites) == given


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": "long"},
        {"ema_decay": 1.0},
        {"denoising": 0, "distill_output": 0, "distill_features": 0},
        {"denoising": -1.0},
        {"lr_scale": "x"},
        {"lr_scale": {"rest": -1}},
    ],
)
def test_averages_and_weights_that_make_no_sense_are_refused(settings):
    with pytest.raises(TrainingError, match="one of them is|A decay lies|Factors"):
        dg.FinetuneConfig(**settings)
