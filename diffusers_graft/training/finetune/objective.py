"""Objective of stage two, for the schedulers of diffusers.

Mean squared error of the prediction (epsilon, v, clean sample or flow), weighted by min-SNR where that is asked for
(arXiv 2303.09556); where the model predicts variances as well (DiT), the variational bound trains them beside it
(arXiv 2102.09672, section 3.1), with the mean held fixed.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...errors import TrainingError, UnknownNameError
from ..noise import is_flow
from ..noised_batch import NoisedBatch

VARIANCES = ("auto", "vb", "ignore")


def objective(
    prediction: torch.Tensor,
    noised: NoisedBatch,
    scheduler: Any,
    *,
    variance: str = "auto",
    min_snr: float | None = None,
) -> torch.Tensor:
    """Return the loss of one batch, averaged over samples.

    Args:
        prediction: of the model, [B, C, ...], or [B, 2 C, ...] with variances.
        scheduler: the noise scheduler of diffusers, None where batches are model arguments.
        variance: `"vb"` trains predicted variances, `"ignore"` leaves them alone, `"auto"` trains those of models that
            predict noise under a DDPM scheduler.
        min_snr: gamma of min-SNR weighting; None weights all noise levels alike.

    Raises `TrainingError` for a target of another shape.
    """
    assert noised.target is not None
    mean = mean_of(prediction, noised.target)
    loss = (mean.float() - noised.target.float()).square().flatten(1).mean(1)
    if min_snr is not None:
        if scheduler is None or noised.timestep is None:
            raise TrainingError(
                "min_snr needs to know the noise: pass noise_scheduler= and batches with a clean sample."
            )
        loss = loss * snr_weight(scheduler, noised.timestep, min_snr)
    if mean is not prediction and trains_variance(scheduler, noised, variance):
        loss = loss + variational_bound(prediction.float(), noised, scheduler)
    return loss.mean()


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error; with learned variance, the first half of the channels is the mean.

    Raises `TrainingError` for a target of another shape.
    """
    return (mean_of(prediction, target).float() - target.float()).square().mean()


def mean_of(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the part of a prediction that is compared with the target: all, or half of its channels.

    Raises `TrainingError` if neither fits.
    """
    mean = prediction
    if prediction.shape[1] == 2 * target.shape[1]:
        mean, _ = prediction.chunk(2, dim=1)
    if mean.shape != target.shape:
        raise TrainingError(
            f"The model predicts {tuple(prediction.shape)}, and its target is {tuple(target.shape)}. Give batches the "
            "shape that the model answers in, or a target of their own."
        )
    return mean


def trains_variance(scheduler: Any, noised: NoisedBatch, variance: str) -> bool:
    """Return whether predicted variances are trained."""
    is_able = scheduler is not None and not is_flow(scheduler) and scheduler.config.prediction_type == "epsilon"
    if variance == "vb" and not (is_able and noised.sample is not None):
        raise TrainingError(
            'variance="vb" needs a DDPM scheduler that predicts epsilon and batches with a clean sample; use "ignore".'
        )
    if variance not in VARIANCES:
        raise UnknownNameError("treatment of predicted variances", variance, VARIANCES)
    return variance == "vb" or (variance == "auto" and is_able and noised.sample is not None)


def snr_weight(scheduler: Any, timestep: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return min(SNR, gamma) on the error of the clean sample, as a weight on the error of the prediction: [B]."""
    if is_flow(scheduler):
        sigma = (timestep.float() / scheduler.config.num_train_timesteps).clamp(1e-4, 1)
        return ((1 - sigma) / sigma).square().clamp(max=gamma) * sigma.square()
    from diffusers.training_utils import compute_snr  # brings all models of diffusers

    snr = compute_snr(scheduler, timestep)
    # Error of the clean sample for an error of one in the prediction.
    factors = {"epsilon": 1 / snr, "sample": torch.ones_like(snr), "v_prediction": 1 / (snr + 1)}
    return snr.clamp(max=gamma) * factors[scheduler.config.prediction_type]


def variational_bound(prediction: torch.Tensor, noised: NoisedBatch, scheduler: Any) -> torch.Tensor:
    """Return bits per dimension of q(x_{t-1} | x_t, x_0) under the predicted Gaussian: [B].

    At t = 0 they are those of the 8-bit sample.

    Gradients reach the variances alone. The second half of the channels lies between the logs of the posterior's
    variance (-1) and of beta (1).
    """
    assert noised.sample is not None
    assert noised.timestep is not None
    noise, between = prediction.chunk(2, dim=1)
    noised_sample = noised.noisy.float()
    sample = noised.sample.float()
    c = _Coefficients(scheduler, noised.timestep, sample.ndim)
    log_variance = torch.lerp(c.log_posterior, c.log_beta, (between + 1) / 2)
    predicted = c.posterior_mean(c.clean(noised_sample, noise.detach()), noised_sample)
    true = c.posterior_mean(sample, noised_sample)
    gap = (true - predicted).square() * (-log_variance).exp()
    divergence = 0.5 * (log_variance - c.log_posterior - 1 + (c.log_posterior - log_variance).exp() + gap)
    bits = torch.where(c.first, -_log_likelihood(sample, predicted, log_variance), divergence)
    return bits.flatten(1).mean(1) / math.log(2)


class _Coefficients:
    """Coefficients of the diffusion at some timesteps, in float64 until they are used."""

    def __init__(self, scheduler: Any, timestep: torch.Tensor, ndim: int):
        betas = scheduler.betas.double()
        signal = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1].cpu()]).to(signal.device)
        posterior = betas * (1 - before) / (1 - signal)

        def at(values: torch.Tensor) -> torch.Tensor:
            return values.to(timestep.device)[timestep].float().view(-1, *[1] * (ndim - 1))

        # The first step's variance is 0 and has no log, so the second's stands in.
        self.log_posterior = at(torch.cat([posterior[1:2], posterior[1:]]).log())
        self.log_beta = at(betas.log())
        self._noise = at((1 / signal - 1).sqrt())
        self._scale = at((1 / signal).sqrt())
        self._of_clean = at(betas * before.sqrt() / (1 - signal))
        self._of_noised = at((1 - before) * (1 - betas).sqrt() / (1 - signal))
        self.first = (timestep == 0).view(-1, *[1] * (ndim - 1))

    def clean(self, noised: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the clean sample that the noise predicted leaves."""
        return self._scale * noised - self._noise * noise

    def posterior_mean(self, clean: torch.Tensor, noised: torch.Tensor) -> torch.Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0)."""
        return self._of_clean * clean + self._of_noised * noised


def _log_likelihood(sample: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihood of values in [-1, 1] on the grid of 8 bits under a Gaussian, its tails at the ends."""
    sharpness = (-0.5 * log_variance).exp()
    above = _normal_cdf(sharpness * (sample - mean + 1 / 255))
    below = _normal_cdf(sharpness * (sample - mean - 1 / 255))
    inside = (above - below).clamp(min=1e-12).log()
    low = above.clamp(min=1e-12).log()
    high = (1 - below).clamp(min=1e-12).log()
    return torch.where(sample < -0.999, low, torch.where(sample > 0.999, high, inside))


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """Return the cumulative normal distribution, in the approximation that DiT was trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
