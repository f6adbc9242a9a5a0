"""Scores of a model on held-out batches, with the protocol that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn
from tqdm.auto import tqdm

from ..errors import TrainingError
from ..inspection import evaluating, predict, require_model
from ..training.batches import Batch
from ..training.finetune.objective import denoising_loss
from ..training.noised_batch import Noising
from .protocol import describe_computation, describe_metric
from .scores import Scores

__all__ = ["Metric", "Scores", "evaluate"]

Metric = Callable[[ModelMixin], dict[str, float]]


@torch.no_grad()
def evaluate(
    model: ModelMixin,
    batches: Iterable[Batch],
    *,
    noise_scheduler: SchedulerMixin | None = None,
    metrics: Iterable[Metric] = (),
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """Measure a model, grafted or not.

    Args:
        batches: held-out batches, a finite number, as for training. The denoising loss draws its timesteps and noise
            from `seed` alone, so models measured on the same batches are compared on the same draw.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.
        metrics: callables from the model to named values, such as `testbed.SampleQuality()`.
        progress: show a bar.

    Raises:
        TrainingError: batches that do not fit the model, have no target, or are none at all.
        ModelError: a pipeline.
    """
    if not isinstance(model, nn.Module):  # a compiled model is one
        require_model(model)
    with evaluating(model):
        loss, samples = _mean_loss(model, batches, noise_scheduler, seed, progress)
        values = {"denoising_loss": loss}
        protocol: dict[str, Any] = {"samples": samples, "seed": seed, **describe_computation(model)}
        if noise_scheduler is not None:
            protocol["noise_scheduler"] = type(noise_scheduler).__name__
        for metric in metrics:
            values.update(metric(model))
            protocol.update(describe_metric(metric))
    return Scores(values, protocol)


def _mean_loss(
    model: ModelMixin, batches: Iterable[Batch], scheduler: SchedulerMixin | None, seed: int, progress: bool
) -> tuple[float, int]:
    """Return the denoising loss, as a mean over samples, and their number."""
    # uniform timesteps and every label, so that scores do not depend on settings of the training
    generator = torch.Generator().manual_seed(seed)
    noising = Noising(scheduler=scheduler, timesteps="uniform", drop_labels=False)
    total = 0.0
    samples = 0
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=None if progress else True):
        noising.require_usable(model, batch)
        noised = noising(model, batch, generator)
        if noised.target is None:
            raise TrainingError('Nothing to compare with: batches need a "sample" to noise, or a "target".')
        # batches may differ in size, so samples are weighed alike
        count = len(noised.target)
        total += denoising_loss(predict(model, noised.inputs), noised.target).item() * count
        samples += count
    if not samples:
        raise TrainingError("There were no batches to evaluate on.")
    return total / samples, samples
