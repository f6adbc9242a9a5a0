"""Noise is that of training, whatever the scheduler samples with, and models are told it as their pipelines tell them."""

import math

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_graft.errors import TrainingError
from diffusers_graft.inspection import predict
from diffusers_graft.inspection.families import argument_names
from diffusers_graft.training.finetune.objective import objective
from diffusers_graft.training.noise import CONVENTIONS, add_noise, draw_shares, find_shift
from diffusers_graft.training.noised_batch import Noising, find_timestep_name

from ..inspection.models import exported, inputs_of, tiny
from ..models import batches, tiny_dit


def drawn(scheduler, model=None, batch=None):
    return Noising(scheduler=scheduler, timesteps="uniform")(
        model or tiny_dit(1), batch or batches(1)[0], torch.Generator().manual_seed(0)
    )


# The scheduler of CogView4.
COGVIEW = {
    "use_dynamic_shifting": True,
    "base_shift": 0.25,
    "max_shift": 0.75,
    "base_image_seq_len": 256,
    "time_shift_type": "linear",
}


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


def test_the_table_names_classes_that_exist():
    assert set(CONVENTIONS) <= set(exported())


@pytest.mark.parametrize("settings", [{"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}, {"shift": 1.0}])
def test_shifted_noise_is_that_of_the_schedulers_training_steps(settings):
    scheduler, model = FlowMatchEulerDiscreteScheduler(**settings), tiny_dit(1)
    share = torch.linspace(1, 1000, 1000).flip(0) / 1000
    clean, ones = torch.zeros(1000, 1), torch.ones(1000, 1)
    noised, timestep, _ = add_noise(scheduler, clean, ones, share, shift=find_shift(model, scheduler))
    torch.testing.assert_close(noised[:, 0], scheduler.sigmas)
    torch.testing.assert_close(timestep, scheduler.timesteps)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_solvers_that_shift_by_the_number_of_tokens_shift_nothing_in_training(name):
    if "use_dynamic_shifting" not in getattr(diffusers, name)().config:
        pytest.skip("this diffusers has no such setting")
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    assert find_shift(tiny_dit(1), getattr(diffusers, name)(**settings)) == 5
    assert find_shift(tiny_dit(1), getattr(diffusers, name)(**settings, use_dynamic_shifting=True)) == 1


def quartiles_of(shift, share=(0.25, 0.5, 0.75)):
    return tuple(shift * u / (1 + (shift - 1) * u) for u in share)


LOGIT_NORMAL = (0.3375, 0.5, 0.6625)


# Quartiles of sigma, from the density and the shift that each training script of diffusers has by default.
@pytest.mark.parametrize(
    ("name", "settings", "quartiles"),
    [
        ("Flux2Transformer2DModel", {"shift": 3.0, "use_dynamic_shifting": True}, (0.25, 0.5, 0.75)),
        ("Krea2Transformer2DModel", {"shift": 3.0, "use_dynamic_shifting": True}, (0.25, 0.5, 0.75)),
        ("ZImageTransformer2DModel", {"shift": 3.0}, quartiles_of(3)),
        # Its script loads the scheduler with shift=3.0, whatever the checkpoint says.
        ("HiDreamImageTransformer2DModel", {"shift": 6.0}, quartiles_of(3)),
        ("Lumina2Transformer2DModel", {"shift": 6.0}, quartiles_of(6)),
        # One token, since the sample below has one.
        ("CogView4Transformer2DModel", COGVIEW, quartiles_of(0.25 + 0.75 / 16)),
        ("GlmImageTransformer2DModel", COGVIEW, quartiles_of(0.25 + 0.75 / 16, LOGIT_NORMAL)),
        ("AuraFlowTransformer2DModel", {"shift": 1.73}, quartiles_of(1.73, LOGIT_NORMAL)),
        ("ChromaTransformer2DModel", {"shift": 3.0, "use_dynamic_shifting": True}, LOGIT_NORMAL),
        ("HunyuanVideoTransformer3DModel", {"shift": 7.0}, quartiles_of(7, LOGIT_NORMAL)),
        ("LTXVideoTransformer3DModel", {"shift": 1.0, "use_dynamic_shifting": True}, LOGIT_NORMAL),
        ("MochiTransformer3DModel", {}, LOGIT_NORMAL),
        ("OmniGenTransformer2DModel", {"shift": 1.0}, LOGIT_NORMAL),
        ("FluxTransformer2DModel", {"shift": 3.0, "use_dynamic_shifting": True}, (0.25, 0.5, 0.75)),
        ("FluxTransformer2DModel", {"shift": 3.0}, (0.5, 0.75, 0.9)),
        ("QwenImageTransformer2DModel", {"shift": 1.0, "use_dynamic_shifting": True}, (0.25, 0.5, 0.75)),
        ("SanaTransformer2DModel", {"shift": 3.0}, (0.5, 0.75, 0.9)),
        ("SD3Transformer2DModel", {"shift": 3.0}, (0.6045, 0.75, 0.8548)),
        ("WanTransformer3DModel", {"shift": 1.0}, (0.3375, 0.5, 0.6625)),
        ("CosmosTransformer3DModel", {"shift": 1.0}, (0.7181, 0.8333, 0.9076)),
    ],
)
def test_timesteps_are_drawn_as_training_scripts_draw_them(name, settings, quartiles):
    """24 families, with those under DDPM and the ones below; `git grep weighting_scheme` in diffusers' examples."""
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    batch = {"sample": torch.randn(4000, 1, 2, 2), "class_labels": torch.zeros(4000, dtype=torch.long)}
    noised = Noising(scheduler=scheduler)(of_class(name), batch, torch.Generator().manual_seed(0))
    found = (noised.timestep / 1000).quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(found, torch.tensor(quartiles), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["DiT", "PixArt", "HunyuanDiT2D", "CogVideoX"])
def test_timesteps_of_ddpm_are_uniform(name):
    names = {"DiT": "DiTTransformer2DModel", "HunyuanDiT2D": "HunyuanDiT2DModel"}
    own = of_class(names.get(name, f"{name}Transformer2DModel"))
    batch = {"sample": torch.randn(4000, 1, 2, 2), "class_labels": torch.zeros(4000, dtype=torch.long)}
    timestep = Noising(scheduler=DDPMScheduler())(own, batch, torch.Generator().manual_seed(0)).timestep
    found = (timestep / 1000).quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(found, torch.tensor([0.25, 0.5, 0.75]), atol=0.02, rtol=0)


@pytest.mark.parametrize("side", [32, 64])
def test_the_noise_of_ideogram_grows_with_the_picture(side):
    """512 and 1,024 pixels; its script draws from a logit-normal of mean log(pixels / 512^2) / 2."""
    own = of_class("Ideogram4Transformer2DModel")
    noised = draw_shares(
        own, FlowMatchEulerDiscreteScheduler(shift=6.0), 4000, torch.Generator().manual_seed(0), tokens=side**2
    )
    mean = torch.tensor(0.5 * math.log((16 * side) ** 2 / 512**2))
    expected = (mean + 1.5 * 0.6745 * torch.tensor([-1.0, 0.0, 1.0])).sigmoid()
    torch.testing.assert_close(noised.quantile(torch.tensor([0.25, 0.5, 0.75])), expected, atol=0.02, rtol=0)
    assert find_shift(own, FlowMatchEulerDiscreteScheduler(shift=6.0)) == 1


def test_cogview_is_noised_by_its_number_of_tokens_and_told_the_timestep_before():
    model = tiny("CogView4Transformer2DModel")
    batch = clean_batch("CogView4Transformer2DModel", model)
    clean = batch["sample"]
    noising = Noising(scheduler=FlowMatchEulerDiscreteScheduler(**COGVIEW))
    noised = noising(model, batch, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.rand(len(clean), generator=generator)
    # As in train_control_cogview4.py.
    tokens = clean.shape[2] * clean.shape[3] // model.config.patch_size**2
    mu = (tokens / 256) ** 0.5 * 0.75 + 0.25
    factor = (mu / (mu + (1 / sigma - 1))).view(-1, 1, 1, 1)
    torch.testing.assert_close(noised.noisy, (1 - factor) * clean + factor * noise)
    torch.testing.assert_close(noised.inputs["timestep"], 1000 * sigma)
    assert torch.equal(noised.target, noise - clean)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["ddpm", "flow"])
@pytest.mark.parametrize(
    "name",
    [
        "HunyuanDiT2DModel",
        "HunyuanVideo15Transformer3DModel",
        "AceStepTransformer1DModel",
        "MiniMaxMusic3Transformer1DModel",
    ],
)
def test_models_that_compute_in_the_dtype_of_the_timestep_are_trained_in_bfloat16_too(name, scheduler):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(name).to(dtype)
        noised = Noising(scheduler=scheduler)(model, clean_batch(name, model), torch.Generator().manual_seed(0))
        assert predict(model, noised.inputs).isfinite().all()


def clean_batch(name, model):
    batch = inputs_of(name)
    batch["sample"] = batch.pop(argument_names(type(model))[0])
    del batch[find_timestep_name(model)]
    return batch


@pytest.mark.parametrize(
    ("name", "shape"), [("AnyFlowTransformer3DModel", (2, 3)), ("SanaWMTransformer3DModel", (2, 1, 3))]
)
def test_videos_whose_frames_may_differ_in_noise_get_a_timestep_a_frame(name, shape):
    model = tiny(name)
    noising = Noising(scheduler=FlowMatchEulerDiscreteScheduler())
    noised = noising(model, clean_batch(name, model), torch.Generator().manual_seed(0))
    assert noised.inputs["timestep"].shape == shape
    assert torch.equal(noised.inputs["timestep"][..., 0].flatten(), noised.timestep)
    assert predict(model, noised.inputs).isfinite().all()


def test_models_that_take_a_list_of_samples_are_noised_as_others_are():
    model = tiny("ZImageTransformer2DModel")
    batch = inputs_of("ZImageTransformer2DModel")
    clean = torch.stack(batch.pop("x"))
    del batch["t"]
    noising = Noising(scheduler=FlowMatchEulerDiscreteScheduler())
    noised = noising(model, {"sample": clean, **batch}, torch.Generator().manual_seed(0))
    assert [one.shape for one in noised.noisy] == [one.shape for one in clean]
    assert predict(model, noised.inputs).shape == noised.target.shape


def test_models_without_a_timestep_are_refused_in_words():
    model = tiny("T5FilmDecoder")
    with pytest.raises(TrainingError, match="T5FilmDecoder takes no timestep"):
        Noising(scheduler=DDPMScheduler())(model, {"sample": torch.zeros(1, 2, 2)}, torch.Generator())


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_noise_and_targets_of_ddpm(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    sample = torch.randn(6, 1, 8, 8)
    noised = Noising(scheduler=scheduler)(tiny_dit(), {"sample": sample}, torch.Generator().manual_seed(0))
    t, x = noised.timestep, noised.inputs["hidden_states"]
    a = scheduler.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    s = (1 - scheduler.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    noise = (x - a * sample) / s
    expected = {"epsilon": noise, "sample": sample, "v_prediction": a * noise - s * sample}[kind]
    torch.testing.assert_close(noised.target, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_and_targets_of_flow_matching(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sample = torch.randn(512, 1, 2, 2)
    noised = Noising(scheduler=scheduler, timesteps="uniform")(
        tiny_dit(), {"sample": sample}, torch.Generator().manual_seed(0)
    )
    sigma = noised.inputs["timestep"].view(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(noised.inputs["hidden_states"], sample + sigma * noised.target, rtol=1e-4, atol=1e-4)
    median = shift * 0.5 / (1 + (shift - 1) * 0.5)
    assert sigma.median().item() == pytest.approx(median, abs=0.06)


@pytest.mark.parametrize(
    ("scheduler", "timesteps", "uniform"),
    [
        (DDPMScheduler(), "auto", True),
        (DDPMScheduler(), "logit_normal", False),
        (FlowMatchEulerDiscreteScheduler(), "auto", False),
        (FlowMatchEulerDiscreteScheduler(), "uniform", True),
    ],
    ids=["ddpm", "ddpm logit-normal", "flow", "flow uniform"],
)
def test_timesteps_are_distributed_as_for_the_scheduler(scheduler, timesteps, uniform):
    """How many lie in the middle half: 0.5 of a uniform draw, P(|z| < ln 3) = 0.73 of a logit-normal one."""
    sample = torch.zeros(4000, 1, 1, 1)
    noised = Noising(scheduler=scheduler, timesteps=timesteps)(
        tiny_dit(), {"sample": sample}, torch.Generator().manual_seed(0)
    )
    share = noised.inputs["timestep"].double() / 1000
    expected = 0.5 if uniform else torch.special.erf(torch.tensor(3.0).log() / 2**0.5).item()
    assert ((share > 0.25) & (share < 0.75)).double().mean().item() == pytest.approx(expected, abs=0.03)
