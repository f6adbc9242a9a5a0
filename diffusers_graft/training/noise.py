"""The noise that models were trained under: read from their schedulers, whose own noising is for sampling.

Those that sample in few steps noise along the steps of their last call, each in a scale of its own. What a model
learned
under is simpler: a share of variance that is kept (`alphas_cumprod`), or a straight line from the sample to noise.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin

from ..errors import TrainingError, UnknownNameError

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")

# What the pipelines of flow models do that no argument tells; the others pass timesteps and take predictions as they
# are.
_SHARE_BACK = (
    "Ideogram4Transformer2DModel",
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "ZImageTransformer2DModel",
)
_SHARE = (  # of noise, from 0 to 1, in place of a timestep; that of the sample in those above
    "AuraFlowTransformer2DModel",
    "BriaFibo2Transformer2DModel",
    "ChromaTransformer2DModel",
    "CosmosTransformer3DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "Krea2Transformer2DModel",
    "LongCatAudioDiTTransformer",
    "LongCatImageTransformer2DModel",
    "NucleusMoEImageTransformer2DModel",
    "OvisImageTransformer2DModel",
    "PRXTransformer2DModel",
    "QwenImageTransformer2DModel",
    "QwenImage21Transformer2DModel",
    *_SHARE_BACK,
)
_ONE_LESS = ("GlmImageTransformer2DModel",)  # counts timesteps from 0, schedulers of flows from 1
_TO_SAMPLE = (
    "HiDreamImageTransformer2DModel",
    "NucleusMoEImageTransformer2DModel",
    *_SHARE_BACK,
)  # predict sample - noise


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is of the flow matching family."""
    straight = not hasattr(scheduler, "alphas_cumprod") and "shift" in scheduler.config
    return straight or scheduler.config.get("prediction_type") == "flow_prediction"


def require_known_scheduler(scheduler: SchedulerMixin) -> None:
    """Raise `TrainingError` for a scheduler under which it is not known how models are trained, or what they predict."""
    if not isinstance(scheduler, SchedulerMixin):
        raise TrainingError(f"A noise_scheduler is a scheduler of diffusers, as pipe.scheduler is; got {scheduler!r}.")
    config = scheduler.config
    counted = "num_train_timesteps" in config and config.get("timestep_type") != "continuous"
    if not (counted and (is_flow(scheduler) or hasattr(scheduler, "alphas_cumprod"))):
        raise TrainingError(
            f"{type(scheduler).__name__} noises in a way that is not known here: pass the DDPMScheduler or "
            "FlowMatchEulerDiscreteScheduler that the model was trained under, or batches of complete model arguments."
        )
    if not is_flow(scheduler) and config.prediction_type not in PREDICTIONS:
        raise UnknownNameError("prediction type", config.prediction_type, PREDICTIONS)


def add_noise(
    scheduler: SchedulerMixin, sample: torch.Tensor, epsilon: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NoisedBatch sample, timestep [B] as the scheduler counts, and what is to be predicted, `share` [B] of the way to
    noise.
    """
    steps, config = scheduler.config.num_train_timesteps, scheduler.config

    def of_each(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, *[1] * (sample.ndim - 1)).to(sample.dtype)

    if is_flow(scheduler):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        sigma = (shift * share / (1 + (shift - 1) * share)).to(sample.device)
        return torch.lerp(sample, epsilon, of_each(sigma)), sigma * steps, epsilon - sample
    timestep = (share * steps).long().clamp(max=steps - 1).to(sample.device)
    kept = scheduler.alphas_cumprod.to(sample.device)[timestep]
    signal, noisiness = of_each(kept.sqrt()), of_each((1 - kept).sqrt())
    targets = {"epsilon": epsilon, "sample": sample, "v_prediction": signal * epsilon - noisiness * sample}
    return signal * sample + noisiness * epsilon, timestep, targets[config.prediction_type]


def convert_for_model(
    model: ModelMixin, scheduler: SchedulerMixin, timestep: torch.Tensor, target: torch.Tensor
) -> tuple[Any, Any]:
    """Timestep and target in the way of a model, as its pipelines have them."""
    if not is_flow(scheduler):
        return timestep, target
    back, steps = scheduler.config.get("invert_sigmas", False), scheduler.config.num_train_timesteps
    told = steps - timestep if back or _is(model, _SHARE_BACK) else timestep - int(_is(model, _ONE_LESS))
    return told / steps if _is(model, _SHARE) else told, -target if back or _is(model, _TO_SAMPLE) else target


def _is(model: ModelMixin, names: tuple[str, ...]) -> bool:
    return any(cls.__name__ in names for cls in type(model).__mro__)
