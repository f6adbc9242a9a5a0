"""Noise is that of training, whatever the scheduler samples with, and models are told it as their pipelines tell them."""

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_graft.errors import TrainingError
from diffusers_graft.training.finetune.objective import objective
from diffusers_graft.training.noise import _ONE_LESS, _SHARE, _TO_SAMPLE
from diffusers_graft.training.noised_batch import Noising

from ..inspection.models import exported
from ..models import batches, tiny_dit


def drawn(scheduler, model=None, batch=None):
    return Noising(scheduler=scheduler, timesteps="uniform")(
        model or tiny_dit(1), batch or batches(1)[0], torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_schedulers_of_sampling_noise_as_the_model_was_trained(kind):
    reference, clean = DDPMScheduler(prediction_type=kind), batches(1)[0]["sample"]
    wanted = drawn(reference)
    epsilon = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wanted.noisy, reference.add_noise(clean, epsilon, wanted.timestep))
    if kind == "v_prediction":
        torch.testing.assert_close(wanted.target, reference.get_velocity(clean, epsilon, wanted.timestep))
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": kind}
    for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "DDIMScheduler"):
        scheduler = getattr(diffusers, name)(**betas)
        for steps in (20, 7):
            torch.testing.assert_close(drawn(scheduler).noisy, wanted.noisy)
            torch.testing.assert_close(drawn(scheduler).target, wanted.target)
            scheduler.set_timesteps(steps)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_solvers_of_flows_noise_as_flows(name):
    solver = getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    one, other = drawn(solver), drawn(FlowMatchEulerDiscreteScheduler(shift=3.0))
    for name in ("noisy", "target", "timestep"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMEulerScheduler(),
        diffusers.IPNDMScheduler(),
        diffusers.SCMScheduler(),
        diffusers.ScoreSdeVeScheduler(),
        diffusers.KarrasVeScheduler(),
        diffusers.EulerDiscreteScheduler(timestep_type="continuous"),
        "ddpm",
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_noise_that_is_not_known_is_refused(scheduler):
    with pytest.raises(TrainingError, match="complete model arguments|as pipe.scheduler is"):
        Noising(scheduler=scheduler)


def of_class(name):
    """As far as noise is concerned."""
    return type(name, (type(tiny_dit(1)),), {})(**tiny_dit(1).config)


@pytest.mark.parametrize(
    ("name", "told", "sign"),
    [
        ("DiTTransformer2DModel", lambda sigma: 1000 * sigma, 1),
        ("FluxTransformer2DModel", lambda sigma: sigma, 1),
        ("GlmImageTransformer2DModel", lambda sigma: 1000 * sigma - 1, 1),
        ("NucleusMoEImageTransformer2DModel", lambda sigma: sigma, -1),
        ("Lumina2Transformer2DModel", lambda sigma: 1 - sigma, -1),
    ],
)
def test_models_of_flows_are_told_noise_as_their_pipelines_tell_it(name, told, sign):
    scheduler, model = FlowMatchEulerDiscreteScheduler(shift=3.0), of_class(name)
    plain, own = drawn(scheduler), drawn(scheduler, model)
    torch.testing.assert_close(own.inputs["timestep"], told(plain.timestep / 1000))
    assert torch.equal(own.noisy, plain.noisy)
    assert torch.equal(own.target, sign * plain.target)
    assert objective(own.target, own, scheduler, min_snr=5.0) == 0
    off = [objective(one.target + 1, one, scheduler, min_snr=5.0) for one in (plain, own)]
    torch.testing.assert_close(*off)


def test_inverted_sigmas_count_the_other_way():
    plain, inverted = (
        drawn(FlowMatchEulerDiscreteScheduler()),
        drawn(FlowMatchEulerDiscreteScheduler(invert_sigmas=True)),
    )
    torch.testing.assert_close(inverted.inputs["timestep"], 1000 - plain.timestep)
    assert torch.equal(inverted.target, -plain.target)


def test_the_timestep_has_the_name_that_the_model_gives_it():
    class Other(type(tiny_dit(1))):
        def forward(self, hidden_states, timesteps, class_labels=None, return_dict=True):
            return super().forward(hidden_states, timesteps, class_labels=class_labels, return_dict=return_dict)

    assert "timesteps" in drawn(DDPMScheduler(), Other(**tiny_dit(1).config)).inputs


def test_the_tables_name_classes_that_exist():
    assert {*_SHARE, *_ONE_LESS, *_TO_SAMPLE} <= set(exported())
