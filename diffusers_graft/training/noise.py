"""Noise as models were trained under it, read from their schedulers and from the training scripts of diffusers.

Schedulers that sample in few steps noise along the steps of their last call, each in another scale. Training is
simpler: a variance-preserving chain (`alphas_cumprod`, DDPM), or a straight line from the sample to noise (flow
matching), on which `sigma` is the share of noise.

DDPM models draw uniform timesteps. Flow models draw a share u in (0, 1) by the density below; then
sigma = s u / (1 + (s - 1) u) with the shift s of the scheduler, as `FlowMatchEulerDiscreteScheduler` computes its
sigmas: `shift`, or `flow_shift` of solvers. Under `use_dynamic_shifting` the training scripts of diffusers shift
nothing (s = 1), except those of CogView4, whose shift grows with the N tokens of the image.

====================================================  ========================  ======================================
classes                                               density of u, shift       source
====================================================  ========================  ======================================
DiT, PixArt, HunyuanDiT, CogVideoX and others under   uniform timesteps         the papers; examples/cogvideo,
a scheduler of DDPM                                                             research_projects/pixart
Flux, Flux2, Krea2, QwenImage, Sana, ZImage           uniform                   examples/dreambooth/train_dreambooth_*
                                                                                (`--weighting_scheme none`)
HiDreamImage                                          uniform, s = 3            the same
Lumina2                                               uniform                   the same, which shifts the share of
                                                                                the sample; its pipeline that of noise
CogView4                                              uniform,                  examples/cogview4-control; told 1000 u
                                                      s = 0.75 sqrt(N / 256)
                                                      + 0.25
GlmImage                                              logit-normal (0, 1),      its pipeline shifts and tells as
                                                      s as CogView4             CogView4's does
SD3                                                   logit-normal (0, 1)       examples/dreambooth, train_*_sd3
Ideogram4                                             logit-normal              examples/dreambooth; N = 1,024 at 512
                                                      (log(N / 1024) / 2, 1.5), pixels
                                                      s = 1
Cosmos                                                logit-normal (0, 1),      examples/cosmos
                                                      s = 5
all other flows                                       logit-normal (0, 1)       arXiv 2403.03206, section 3.1
====================================================  ========================  ======================================
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin

from ..errors import TrainingError, UnknownNameError

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
DENSITIES = ("auto", "uniform", "logit_normal")

# A `SchedulerMixin`; its settings and schedules come from its other bases, which that type does not name.
NoiseScheduler = Any


@dataclass(frozen=True, kw_only=True)
class Convention:
    """Convention of one flow model: the timesteps it is trained on, and what its pipelines do that no argument says.

    Attributes:
        density, logit_std: how the share of noise is drawn, see the table above.
        shift: of the training script; None is the scheduler's.
        usual_tokens: tokens of the size at which the mean of a logit-normal density is zero; it moves with their
            number. None leaves it there.
        shifts_by_tokens: dynamic shifting is part of the training, and the model is told the timestep before it.
        unit_time: the model is given a share from 0 to 1 in place of a timestep.
        reversed_time: its time counts the share of the sample, not of the noise.
        time_offset: added to the timestep; schedulers of flows count from 1.
        predicts_sample: it predicts sample - noise, in place of noise - sample.
        half_time: it computes in the dtype of the timestep, which therefore is the sample's.
        frame_axis, time_ndim: of videos whose frames may differ in noise, the axis of the latents that counts frames,
            and the number of axes of the timestep, of which the last counts frames too.
        takes_list: its noised input is a list of samples.
    """

    density: str = "logit_normal"
    logit_std: float = 1.0
    shift: float | None = None
    usual_tokens: int | None = None
    shifts_by_tokens: bool = False
    unit_time: bool = False
    reversed_time: bool = False
    time_offset: int = 0
    predicts_sample: bool = False
    half_time: bool = False
    frame_axis: int | None = None
    time_ndim: int = 1
    takes_list: bool = False


# Classes that are not in the table are given the timestep as it is, and predict noise - sample.
_DEFAULT = Convention()
_UNIT_TIME = Convention(unit_time=True)
_UNIFORM_UNIT_TIME = Convention(unit_time=True, density="uniform")
_REVERSED = functools.partial(Convention, unit_time=True, reversed_time=True, predicts_sample=True)
_HALF_TIME = Convention(half_time=True)

CONVENTIONS = {
    "AceStepTransformer1DModel": _HALF_TIME,
    "AnyFlowFARTransformer3DModel": Convention(frame_axis=1, time_ndim=2),
    "AnyFlowTransformer3DModel": Convention(frame_axis=1, time_ndim=2),
    "AuraFlowTransformer2DModel": _UNIT_TIME,
    "BriaFibo2Transformer2DModel": _UNIT_TIME,
    "ChromaTransformer2DModel": _UNIT_TIME,
    "CogView4Transformer2DModel": Convention(density="uniform", shifts_by_tokens=True),
    "CosmosTransformer3DModel": Convention(unit_time=True, shift=5.0),
    "Flux2Transformer2DModel": _UNIFORM_UNIT_TIME,
    "FluxTransformer2DModel": _UNIFORM_UNIT_TIME,
    "GlmImageTransformer2DModel": Convention(shifts_by_tokens=True, time_offset=-1),
    "HiDreamImageTransformer2DModel": Convention(density="uniform", shift=3.0, predicts_sample=True),
    "HunyuanDiT2DModel": _HALF_TIME,
    "HunyuanImageTransformer2DModel": _HALF_TIME,
    "HunyuanVideo15Transformer3DModel": _HALF_TIME,
    "Ideogram4Transformer2DModel": _REVERSED(logit_std=1.5, usual_tokens=1024, shift=1.0, half_time=True),
    "Krea2Transformer2DModel": _UNIFORM_UNIT_TIME,
    "LongCatAudioDiTTransformer": _UNIT_TIME,
    "LongCatImageTransformer2DModel": _UNIT_TIME,
    "Lumina2Transformer2DModel": _REVERSED(density="uniform"),
    "LuminaNextDiT2DModel": _REVERSED(),
    "MiniMaxMusic3Transformer1DModel": _HALF_TIME,
    "NucleusMoEImageTransformer2DModel": Convention(unit_time=True, predicts_sample=True),
    "OvisImageTransformer2DModel": _UNIT_TIME,
    "PRXTransformer2DModel": _UNIT_TIME,
    "QwenImage21Transformer2DModel": _UNIT_TIME,
    "QwenImageTransformer2DModel": _UNIFORM_UNIT_TIME,
    "SanaTransformer2DModel": Convention(density="uniform"),
    "SanaWMTransformer3DModel": Convention(frame_axis=2, time_ndim=3),
    "WanAnimate2Transformer3DModel": Convention(takes_list=True),
    "ZImageTransformer2DModel": _REVERSED(density="uniform", takes_list=True),
}


def find_convention(model: ModelMixin) -> Convention:
    """Return the convention of a model's class, or of its nearest base in the table."""
    return next((CONVENTIONS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in CONVENTIONS), _DEFAULT)


def is_flow(scheduler: NoiseScheduler) -> bool:
    """Return whether a scheduler belongs to flow matching."""
    if scheduler.config.get("prediction_type") == "flow_prediction":
        return True
    # Solvers serve both kinds, and have the chain of DDPM in either case.
    return not hasattr(scheduler, "alphas_cumprod") and "shift" in scheduler.config


def require_known_scheduler(scheduler: NoiseScheduler) -> None:
    """Raise `TrainingError` for a scheduler whose models are trained in a way that is not known here."""
    if not issubclass(type(scheduler), SchedulerMixin):
        raise TrainingError(f"A noise_scheduler is a scheduler of diffusers, as pipe.scheduler is; got {scheduler!r}.")
    config = scheduler.config
    # Without a number of steps there is no timestep to draw; EDM counts in logarithms of sigma.
    is_counted = "num_train_timesteps" in config and config.get("timestep_type") != "continuous"
    has_schedule = is_flow(scheduler) or hasattr(scheduler, "alphas_cumprod")
    if not is_counted or not has_schedule:
        raise TrainingError(
            f"{type(scheduler).__name__} noises in a way that is not known here: pass the DDPMScheduler or "
            "FlowMatchEulerDiscreteScheduler that the model was trained under, or batches of complete model arguments."
        )
    if not is_flow(scheduler) and config.prediction_type not in PREDICTIONS:
        raise UnknownNameError("prediction type", config.prediction_type, PREDICTIONS)


def draw_shares(
    model: ModelMixin,
    scheduler: NoiseScheduler,
    count: int,
    generator: torch.Generator,
    density: str = "auto",
    *,
    tokens: int | None = None,
) -> torch.Tensor:
    """Return the share of noise of each sample before any shift, from 0 (clean) to 1: [B], on CPU.

    Args:
        tokens: of the image, None where their number is not known.
        density: one of `DENSITIES`; `"auto"` is uniform for DDPM, and else what the model was trained with.
    """
    convention = find_convention(model)
    if density != "auto":
        # Asked for by name: the plain density of that name, not the one of the model.
        convention = Convention(density=density)
    elif not is_flow(scheduler):
        convention = Convention(density="uniform")
    if convention.density == "uniform":
        return torch.rand(count, generator=generator)
    mean = 0.0
    if tokens is not None and convention.usual_tokens is not None:
        mean = math.log(tokens / convention.usual_tokens) / 2
    return (mean + convention.logit_std * torch.randn(count, generator=generator)).sigmoid()


def find_shift(model: ModelMixin, scheduler: NoiseScheduler, tokens: int | None = None) -> float:
    """Return the factor by which timesteps of a flow model are shifted in training; 1 shifts nothing.

    Args:
        tokens: of the image, None where their number is not known.
    """
    convention = find_convention(model)
    if convention.shift is not None:
        return convention.shift
    if scheduler.config.get("use_dynamic_shifting", False):
        # Of most models it is applied by pipelines alone, not in training.
        if not convention.shifts_by_tokens or tokens is None:
            return 1.0
        usual = scheduler.config.get("base_image_seq_len", 256)
        largest = scheduler.config.get("max_shift", 0.75)
        return math.sqrt(tokens / usual) * largest + scheduler.config.get("base_shift", 0.25)
    return scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))


def add_noise(
    scheduler: NoiseScheduler, sample: torch.Tensor, noise: torch.Tensor, share: torch.Tensor, *, shift: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the noised sample, its timestep [B] as the scheduler counts, and what is to be predicted.

    Args:
        sample, noise: [B, C, ...].
        share: [B], how much of the way to noise.
        shift: of the timesteps of flows, see `find_shift`.
    """
    steps = scheduler.config.num_train_timesteps
    if is_flow(scheduler):
        sigma = (shift * share / (1 + (shift - 1) * share)).to(sample.device)
        # `lerp` gives the sample itself at 0 and the noise itself at 1.
        return torch.lerp(sample, noise, _expand(sigma, sample)), sigma * steps, noise - sample
    # DDPM counts its steps from 0, and a share of 1 would be one step too many.
    timestep = (share * steps).long().clamp(max=steps - 1).to(sample.device)
    signal_variance = scheduler.alphas_cumprod.to(sample.device)[timestep]
    signal = _expand(signal_variance.sqrt(), sample)
    noisiness = _expand((1 - signal_variance).sqrt(), sample)
    targets = {"epsilon": noise, "sample": sample, "v_prediction": signal * noise - noisiness * sample}
    return signal * sample + noisiness * noise, timestep, targets[scheduler.config.prediction_type]


def split_noised(
    scheduler: NoiseScheduler, noised: torch.Tensor, timestep: torch.Tensor, prediction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sample and the noise that a prediction finds in a noised sample: the inverse of `add_noise`."""
    if is_flow(scheduler):
        sigma = _expand(timestep / scheduler.config.num_train_timesteps, noised)
        sample = noised - sigma * prediction
        return sample, sample + prediction
    signal_variance = scheduler.alphas_cumprod.to(noised.device)[timestep]
    signal = _expand(signal_variance.sqrt(), noised)
    noisiness = _expand((1 - signal_variance).sqrt(), noised)
    if scheduler.config.prediction_type == "epsilon":
        return (noised - noisiness * prediction) / signal, prediction
    if scheduler.config.prediction_type == "sample":
        return prediction, (noised - signal * prediction) / noisiness
    return signal * noised - noisiness * prediction, noisiness * noised + signal * prediction


def convert_for_model(
    model: ModelMixin,
    scheduler: NoiseScheduler,
    noised: torch.Tensor,
    timestep: torch.Tensor,
    target: torch.Tensor,
    *,
    share: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return timestep and target in the convention of a model, as its pipelines have them.

    Timesteps are floating-point numbers: some models compute in the dtype of the timestep, and all embed it as such.

    Args:
        share: of noise before the shift, [B].
    """
    convention = find_convention(model)
    if is_flow(scheduler):
        steps = scheduler.config.num_train_timesteps
        if convention.shifts_by_tokens and share is not None and scheduler.config.get("use_dynamic_shifting", False):
            timestep = share.to(timestep) * steps
        # Inverted sigmas (Mochi's scheduler, for one) count from noise to sample.
        is_inverted = scheduler.config.get("invert_sigmas", False)
        if is_inverted or convention.predicts_sample:
            target = -target
        if is_inverted or convention.reversed_time:
            timestep = steps - timestep
        timestep = timestep + convention.time_offset
        if convention.unit_time:
            timestep = timestep / steps
    timestep = timestep.to(noised.dtype if convention.half_time else torch.float32)
    if convention.frame_axis is not None:
        frames = noised.shape[convention.frame_axis]
        timestep = timestep.view(-1, *[1] * (convention.time_ndim - 1)).expand(
            *[-1] * (convention.time_ndim - 1), frames
        )
    return timestep, target


def _expand(values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Return one value a sample, shaped to multiply it."""
    return values.view(-1, *[1] * (sample.ndim - 1)).to(sample.dtype)
