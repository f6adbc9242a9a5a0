"""States of the grafted model's own sampling, as inputs of stage two in place of noised data.

Noised data never shows a model where its own errors lead it when it samples. Here the grafted model goes there by
itself, from pure noise, and the ungrafted model's prediction there is the target: both are matched along the sampling
trajectory. Matching distributions (LinVideo, arXiv 2510.08318) also moves the state itself, through the last step, to
where the ungrafted model finds it more likely. Samples give their shape alone, so zeros serve where there is no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ModelMixin

from ...errors import TrainingError
from ...inspection import evaluating, predict
from ..noise import add_noise, convert_for_model, find_convention, is_flow, split_noised
from ..noised_batch import NoisedBatch, find_timestep_name
from .objective import mean_of


@dataclass(frozen=True)
class SamplingStep:
    """A step of DDIM, or of Euler's method for flows, without guidance.

    Both are one formula: the predicted sample and the predicted noise are mixed anew at the next level.

    Attributes:
        inputs: of the model, the noised state among them.
        state: where the step begins, [B, C, ...].
        timestep: of the state, [B], as the scheduler counts.
        next_share: the share of noise where the step ends, [B].
    """

    inputs: dict[str, Any]
    state: torch.Tensor
    timestep: torch.Tensor
    next_share: torch.Tensor

    def take(self, model: ModelMixin, scheduler: Any, forward: Callable[..., Any] | None = None) -> torch.Tensor:
        """Return the state at the end, by a model or by its compiled `forward`."""
        prediction = mean_of(predict(model, self.inputs, forward), self.state)
        sample, noise = _split(model, scheduler, self.state, self.timestep, prediction)
        return add_noise(scheduler, sample, noise, self.next_share)[0].to(self.state.dtype)


@torch.no_grad()
def reach_by_sampling(
    model: ModelMixin, noised: NoisedBatch, scheduler: Any, steps: int
) -> tuple[NoisedBatch, SamplingStep]:
    """Return a batch of states that the model reached, each at its own timestep, without a target; and the last step.

    Args:
        noised: its noise is where the model starts, its timesteps are where it ends.
        steps: how many lead there.

    Raises `TrainingError` for batches of model arguments, and for models whose timesteps are not known here.
    """
    _require_known_path(model, noised, scheduler)
    assert noised.noise is not None
    assert noised.timestep is not None
    state = noised.noise
    levels = scheduler.config.num_train_timesteps
    # The middle of a step of DDPM, which counts in whole ones.
    end = noised.timestep.float() / levels if is_flow(scheduler) else (noised.timestep + 0.5) / levels
    shares = [torch.lerp(torch.ones_like(end), end, number / steps) for number in range(steps + 1)]
    noisy_name, *_ = noised.inputs
    with evaluating(model):
        for share, next_share in zip(shares, shares[1:], strict=False):
            _, timestep, _ = add_noise(scheduler, state, state, share)
            time, _ = convert_for_model(model, scheduler, state, timestep, state)
            inputs = {**noised.inputs, noisy_name: state, find_timestep_name(model): time}
            step = SamplingStep(inputs, state, timestep, next_share)
            state = step.take(model, scheduler)
    return replace(noised, inputs={**noised.inputs, noisy_name: state}, target=None, sample=None), step


def distribution_loss(
    model: ModelMixin,
    scheduler: Any,
    noised: NoisedBatch,
    reached: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
) -> torch.Tensor:
    """Return half the squared difference of both noises, whose gradient moves the state that was reached.

    The divergence of the student's distribution from the teacher's, KL(q_t || p_t), falls along the difference of
    their scores, which both models predict themselves: a score is the noise over -sigma. It is weighted by sigma, so
    that all levels count alike.

    Args:
        noised: the states, and their timesteps.
        reached: the states again, with the gradient of the last step.
        student, teacher: predictions there, as the models give them.
    """
    assert noised.timestep is not None
    found = [
        _split(model, scheduler, noised.noisy, noised.timestep, mean_of(prediction.detach(), noised.noisy))[1]
        for prediction in (student, teacher)
    ]
    direction = found[1] - found[0]
    goal = reached.detach().float() - direction
    return 0.5 * (reached.float() - goal).square().mean()


def _split(
    model: ModelMixin, scheduler: Any, state: torch.Tensor, timestep: torch.Tensor, prediction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sample and the noise that a model finds in a state."""
    # The convention turns a sign, so that turning it again gives the scheduler's.
    _, prediction = convert_for_model(model, scheduler, state, timestep, prediction.float())
    return split_noised(scheduler, state.float(), timestep, prediction)


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
