"""From clean samples to what a denoiser is trained on: noised inputs and the target of the prediction.

A batch is a dict. With a `sample` (latents [B, C, ...]) the rest are conditioning arguments under the model's own names,
and a noise scheduler noises the sample afresh each time. Without, it is a set of model arguments used as it is, with the
`target` of stage two among them.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding
from torch.utils.data import DataLoader, Dataset

from ..errors import TrainingError, UnknownNameError

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Noised:
    """One training example batch: arguments of the model, and what it should predict (None where unknown)."""

    inputs: dict[str, Any]
    target: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Noising:
    """How clean samples become noised ones (paper, Eq. 1 and 2: timesteps and noise redrawn every step).

    Attributes:
        scheduler: diffusers' noise scheduler of the model; None where batches are complete model arguments.
        timesteps: `"auto"` (uniform for DDPM, logit-normal for flow matching), `"uniform"` or `"logit_normal"`.
        drop_labels: drop class labels at the model's own rate, for classifier-free guidance.
    """

    scheduler: SchedulerMixin | None = None
    timesteps: str = "auto"
    drop_labels: bool = True

    def __post_init__(self):
        choices = ("auto", "uniform", "logit_normal")
        if self.timesteps not in choices:
            raise UnknownNameError("way to draw timesteps", self.timesteps, choices)

    def __call__(self, model: ModelMixin, batch: Batch, generator: torch.Generator) -> Noised:
        """Noise one batch; all randomness comes from `generator` (on CPU)."""
        inputs = {name: _onto(value, model) for name, value in batch.items()}
        if "sample" not in inputs:
            target = inputs.pop("target", None)
            return Noised(inputs, target)
        if self.scheduler is None:
            raise TrainingError(
                'Batches hold clean samples (the key "sample"), which need noise: pass noise_scheduler=, the scheduler of '
                "the model's pipeline."
            )
        sample = inputs.pop("sample")
        noise = torch.randn(sample.shape, generator=generator).to(sample)
        share = self._shares(len(sample), generator)
        if self.drop_labels and "class_labels" in inputs:
            inputs["class_labels"] = dropped_labels(model, inputs["class_labels"], generator)
        noised, timestep, target = _noise(self.scheduler, sample, noise, share)
        return Noised({"hidden_states": noised, "timestep": timestep, **inputs}, target)

    def _shares(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Where in the noise schedule each sample lies, from 0 (clean) to 1: [B]."""
        logit_normal = self.timesteps == "logit_normal" or (self.timesteps == "auto" and is_flow(self.scheduler))
        if logit_normal:
            return torch.randn(count, generator=generator).sigmoid()
        return torch.rand(count, generator=generator)


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is of the flow matching family."""
    return not hasattr(scheduler, "alphas_cumprod")


def _noise(scheduler: SchedulerMixin, sample: torch.Tensor, noise: torch.Tensor, share: torch.Tensor):
    """Noised sample, timestep as the model takes it, and the target of its prediction."""
    steps = scheduler.config.num_train_timesteps
    if is_flow(scheduler):
        shift = scheduler.config.get("shift", 1.0)
        sigma = (shift * share / (1 + (shift - 1) * share)).to(sample.device)
        level = sigma.view(-1, *[1] * (sample.ndim - 1)).to(sample.dtype)
        return torch.lerp(sample, noise, level), sigma * steps, noise - sample
    timestep = (share * steps).long().clamp(max=steps - 1).to(sample.device)
    noised = scheduler.add_noise(sample, noise, timestep)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noised, timestep, noise
    if kind == "sample":
        return noised, timestep, sample
    if kind == "v_prediction":
        return noised, timestep, scheduler.get_velocity(sample, noise, timestep)
    raise UnknownNameError("prediction type", kind, ("epsilon", "sample", "v_prediction"))


def dropped_labels(model: ModelMixin, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels with the null label at the model's own rate, once for the whole sample.

    diffusers' DiT would drop them in train() in every block by its own dice, which trains no unconditional model.
    """
    embedding = next((module for module in model.modules() if isinstance(module, LabelEmbedding)), None)
    if embedding is None or not embedding.dropout_prob:
        return labels
    dropped = torch.rand(len(labels), generator=generator) < embedding.dropout_prob
    return labels.masked_fill(dropped.to(labels.device), embedding.num_classes)


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error; of a prediction with learned variance, the first half of the channels is the mean."""
    if prediction.shape[1] == 2 * target.shape[1]:
        prediction = prediction.chunk(2, dim=1)[0]
    return (prediction.float() - target.float()).square().mean()


def _onto(value: Any, model: ModelMixin) -> Any:
    if isinstance(value, Mapping):
        return {name: _onto(item, model) for name, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


def batches_of(dataset: Dataset | Iterable, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless batches.

    Of a map-style dataset (torch's, or of the `datasets` library) they are made of its single samples, shuffled anew each
    epoch; a list or any other iterable holds batches, which are passed on as they come.
    """
    if hasattr(dataset, "__getitem__") and not isinstance(dataset, list | tuple):
        generator = torch.Generator().manual_seed(seed)
        loader: Iterable = DataLoader(dataset, batch_size, shuffle=True, drop_last=len(dataset) >= batch_size,
                                      generator=generator)  # fmt: skip
    else:
        loader = dataset
    yield from repeated(loader)


def repeated(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches over and over. An iterator that ends is an error, since it cannot be started again."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty or iter(batches) is batches:
            raise TrainingError(
                "The batches ran out before the last step. Pass a dataset or list, which can be read again, an endless "
                "iterator, or ask for fewer steps."
            )
