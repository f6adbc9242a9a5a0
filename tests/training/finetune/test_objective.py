"""Objectives of stage two against the formulas of their papers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError, UnknownNameError
from diffusers_graft.training.finetune.objective import denoising_loss, objective, snr_weight
from diffusers_graft.training.noised_batch import NoisedBatch, Noising

from ...models import SCHEDULER, batches, tiny_dit
from ..runs import grafted_model, run_finetune


def test_learned_variance_is_left_out_of_the_loss():
    prediction, target = torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 4)
    assert denoising_loss(prediction, target) == torch.nn.functional.mse_loss(prediction[:, :4], target)


class Original:
    """Training losses of guided diffusion, as DiT uses them: `create_diffusion(learn_sigma=True)`, in numpy.

    https://github.com/facebookresearch/DiT/blob/main/diffusion/gaussian_diffusion.py
    """

    def __init__(self, steps=1000):
        self.betas = np.linspace(0.0001, 0.02, steps, dtype=np.float64)
        alphas = 1.0 - self.betas
        self.kept = np.cumprod(alphas)
        self.kept_prev = np.append(1.0, self.kept[:-1])
        self.posterior_variance = self.betas * (1.0 - self.kept_prev) / (1.0 - self.kept)
        self.posterior_log_variance_clipped = np.log(
            np.append(self.posterior_variance[1], self.posterior_variance[1:])
        )
        self.coef1 = self.betas * np.sqrt(self.kept_prev) / (1.0 - self.kept)
        self.coef2 = (1.0 - self.kept_prev) * np.sqrt(alphas) / (1.0 - self.kept)

    def losses(self, x_start, x_t, noise, t, output):
        eps, values = np.split(output, 2, axis=1)
        at = lambda array: array[t][:, None, None, None]  # noqa: E731
        true_mean = at(self.coef1) * x_start + at(self.coef2) * x_t
        true_log = at(self.posterior_log_variance_clipped)
        frac = (values + 1) / 2
        log_variance = frac * at(np.log(self.betas)) + (1 - frac) * true_log
        pred = at(np.sqrt(1.0 / self.kept)) * x_t - at(np.sqrt(1.0 / self.kept - 1)) * eps
        mean = at(self.coef1) * pred + at(self.coef2) * x_t
        kl = 0.5 * (
            -1.0
            + log_variance
            - true_log
            + np.exp(true_log - log_variance)
            + ((true_mean - mean) ** 2) * np.exp(-log_variance)
        )
        nll = -self.discretized(x_start, mean, 0.5 * log_variance)
        flat = lambda array: array.reshape(len(array), -1).mean(1)  # noqa: E731
        vb = np.where(t == 0, flat(nll), flat(kl)) / np.log(2.0)
        return flat((noise - eps) ** 2), vb

    def discretized(self, x, means, log_scales):
        x, means, log_scales = (
            array.astype(np.float32) for array in (x, means, log_scales)
        )  # as the original has them
        centered, inv = x - means, np.exp(-log_scales)
        cdf = lambda v: 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v**3)))  # noqa: E731
        plus, minus = cdf(inv * (centered + 1.0 / 255.0)), cdf(inv * (centered - 1.0 / 255.0))
        log = lambda v: np.log(np.maximum(v, 1e-12))  # noqa: E731
        return np.where(x < -0.999, log(plus), np.where(x > 0.999, log(1.0 - minus), log(plus - minus)))


def learned_sigma_batch():
    generator = torch.Generator().manual_seed(0)
    sample = torch.rand(6, 2, 4, 4, generator=generator) * 2 - 1
    sample[0, 0, 0] = torch.tensor([-1.0, 1.0, 0.0, 0.5])
    noise = torch.randn(sample.shape, generator=generator)
    timestep = torch.tensor([0, 0, 1, 30, 500, 999])
    output = torch.randn(6, 4, 4, 4, generator=generator)
    noised = SCHEDULER.add_noise(sample, noise, timestep)
    return NoisedBatch({"hidden_states": noised, "timestep": timestep}, noise, sample, timestep), output


def test_learned_sigma_is_the_original_mse_plus_vb():
    noised, output = learned_sigma_batch()
    x_t = noised.inputs["hidden_states"].double().numpy()
    original = Original().losses(
        noised.sample.double().numpy(),
        x_t,
        noised.target.double().numpy(),
        noised.inputs["timestep"].numpy(),
        output.double().numpy(),
    )
    for number in range(6):  # sample by sample, since the first step's likelihood is far larger than the rest
        one = NoisedBatch(
            {name: value[[number]] for name, value in noised.inputs.items()},
            noised.target[[number]],
            noised.sample[[number]],
            noised.timestep[[number]],
        )
        loss = objective(output[[number]], one, SCHEDULER).item()
        assert loss == pytest.approx(original[0][number] + original[1][number], rel=2e-3), number


def test_the_variational_bound_moves_variances_alone():
    noised, output = learned_sigma_batch()
    gradients = {}
    for variance in ("ignore", "vb"):
        prediction = output.clone().requires_grad_()
        objective(prediction, noised, SCHEDULER, variance=variance).backward()
        gradients[variance] = prediction.grad
    torch.testing.assert_close(gradients["vb"][:, :2], gradients["ignore"][:, :2])
    assert not gradients["ignore"][:, 2:].any()
    assert gradients["vb"][:, 2:].any()


def test_variances_are_trained_where_the_original_trained_them():
    noised, output = learned_sigma_batch()
    assert objective(output, noised, SCHEDULER) == objective(output, noised, SCHEDULER, variance="vb")
    flow = FlowMatchEulerDiscreteScheduler()
    assert objective(output, noised, flow) == objective(output, noised, flow, variance="ignore")
    plain = torch.nn.functional.mse_loss(output[:, :2], noised.target).item()
    assert objective(output[:, :2], noised, SCHEDULER).item() == pytest.approx(plain)
    with pytest.raises(TrainingError, match='use "ignore"'):
        objective(output, noised, flow, variance="vb")
    with pytest.raises(UnknownNameError):
        dg.FinetuneConfig(variance="learn")


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_min_snr_is_the_papers_on_the_clean_sample(kind):
    """min(SNR, gamma) |x0 - x0'|^2, whatever is predicted (arXiv 2303.09556, Eq. 7)."""
    scheduler, gamma = DDPMScheduler(prediction_type=kind), 5.0
    sample = torch.randn(4, 1, 4, 4)
    noised = Noising(scheduler=scheduler)(tiny_dit(), {"sample": sample}, torch.Generator().manual_seed(0))
    prediction = torch.randn_like(sample)
    kept = scheduler.alphas_cumprod[noised.timestep].view(-1, 1, 1, 1)
    a, s, x_t = kept.sqrt(), (1 - kept).sqrt(), noised.inputs["hidden_states"]
    clean = {"epsilon": (x_t - s * prediction) / a, "sample": prediction, "v_prediction": a * x_t - s * prediction}[
        kind
    ]
    weight = (kept / (1 - kept)).clamp(max=gamma)
    expected = (weight * (clean - sample).square()).mean()
    torch.testing.assert_close(objective(prediction, noised, scheduler, min_snr=gamma), expected, rtol=1e-3, atol=1e-4)


def test_min_snr_of_flow_matching():
    scheduler, gamma = FlowMatchEulerDiscreteScheduler(), 5.0
    sigma = torch.tensor([0.1, 0.5, 0.9])
    weight = snr_weight(scheduler, 1000 * sigma, gamma)
    torch.testing.assert_close(weight, ((1 - sigma) / sigma).square().clamp(max=gamma) * sigma.square())
    ones = torch.ones(1, 1, 2, 2)
    for noised, known in ((NoisedBatch({}, ones), scheduler), (NoisedBatch({}, ones, ones), None)):
        with pytest.raises(TrainingError, match="noise_scheduler="):
            objective(ones, noised, known, min_snr=5.0)


SCHEDULERS = {
    "flow": FlowMatchEulerDiscreteScheduler(),
    "v": DDPMScheduler(prediction_type="v_prediction"),
    "epsilon": SCHEDULER,
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("make", [tiny_dit, lambda: tiny_dit(out_channels=2)], ids=["plain", "learned sigma"])
def test_every_objective_trains(name, make):
    model = grafted_model(make)
    losses = run_finetune(model, batches(1, size=16), SCHEDULERS[name], steps=60, lr=3e-3)
    assert sum(losses[-15:]) < sum(losses[:15])
