"""States of the grafted model's own sampling, as inputs of stage two in place of noised data.

Noised data never shows a model where its own errors lead it when it samples. Here the grafted model goes there by
itself, from pure noise, and the ungrafted model's prediction there is the target: both are matched along the sampling
trajectory, as in LinVideo (arXiv 2510.08318), but without a gradient through the sampling. Samples give their shape
alone, so zeros serve where there is no data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import ModelMixin

from ...errors import TrainingError
from ...inspection import evaluating, predict
from ..noise import add_noise, convert_for_model, find_convention, is_flow, split_noised
from ..noised_batch import NoisedBatch, find_timestep_name
from .objective import mean_of


@torch.no_grad()
def reach_by_sampling(model: ModelMixin, noised: NoisedBatch, scheduler: Any, steps: int) -> NoisedBatch:
    """Return a batch whose noised samples the model reached itself, each at its own timestep, without a target.

    Args:
        noised: its noise is where the model starts, its timesteps are where it ends.
        steps: of DDIM, or of Euler's method for flows, without guidance. Both are one formula: the predicted sample
            and the predicted noise are mixed anew at the next level.

    Raises `TrainingError` for batches of model arguments, and for models whose timesteps are not known here.
    """
    _require_known_path(model, noised, scheduler)
    assert noised.noise is not None
    assert noised.timestep is not None
    state = noised.noise
    levels = scheduler.config.num_train_timesteps
    # The middle of a step of DDPM, which counts in whole ones.
    end = noised.timestep.float() / levels if is_flow(scheduler) else (noised.timestep + 0.5) / levels
    noisy_name, *_ = noised.inputs
    inputs = dict(noised.inputs)
    with evaluating(model):
        for number in range(steps):
            share = torch.lerp(torch.ones_like(end), end, number / steps)
            _, timestep, _ = add_noise(scheduler, state, state, share)
            inputs[noisy_name] = state
            inputs[find_timestep_name(model)], _ = convert_for_model(model, scheduler, state, timestep, state)
            prediction = mean_of(predict(model, inputs), state).float()
            # The convention turns a sign, so that turning it again gives the scheduler's.
            _, prediction = convert_for_model(model, scheduler, state, timestep, prediction)
            sample, noise = split_noised(scheduler, state.float(), timestep, prediction)
            share = torch.lerp(torch.ones_like(end), end, (number + 1) / steps)
            state = add_noise(scheduler, sample, noise, share)[0].to(state.dtype)
    return replace(noised, inputs={**noised.inputs, noisy_name: state}, target=None, sample=None)


def _require_known_path(model: ModelMixin, noised: NoisedBatch, scheduler: Any) -> None:
    if noised.noise is None:
        raise TrainingError(
            "Batches hold model arguments, and a trajectory begins at noise: give batches with a sample, whose shape "
            "alone is used, and the noise_scheduler; or set trajectory=0."
        )
    convention = find_convention(model)
    is_shifted = convention.shifts_by_tokens and scheduler.config.get("use_dynamic_shifting", False)
    if convention.takes_list or is_shifted:
        raise TrainingError(f"How {type(model).__name__} counts time on the way is not known here: set trajectory=0.")
