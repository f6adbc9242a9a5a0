"""Scores of a model on held-out batches, or of the samples that a pipeline draws, with the protocol that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn
from tqdm.auto import tqdm

from ..core.progress import hide_bar
from ..errors import GraftError, TrainingError
from ..inspection import evaluating, predict, require_model
from ..training.batches import Batch
from ..training.finetune.objective import denoising_loss
from ..training.noised_batch import Noising
from .metrics.base import SampleMetric
from .metrics.prediction_error import PredictionError, require_teacher
from .protocol import describe_computation, describe_metric
from .sample_scores import score_samples
from .sampling import Sampling, model_of
from .scores import Scores

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Metric", "Scores", "evaluate"]

Metric = Callable[[Any], dict[str, float]] | SampleMetric | PredictionError


@torch.no_grad()
def evaluate(
    model: ModelMixin | DiffusionPipeline,
    batches: Iterable[Batch] | Iterable[Any],
    *,
    noise_scheduler: SchedulerMixin | None = None,
    metrics: Iterable[Metric] = (),
    seed: int = 0,
    progress: bool | None = None,
    sampling: Sampling | None = None,
    output: str | Path | None = None,
    save_npz: str | Path | None = None,
) -> Scores:
    """Measure a model, grafted or not, on held-out batches; or the samples that a pipeline draws.

    A pipeline, or a model with `sampling`, draws one sample or more for every prompt, class label, or line of
    GenEval's metadata. What can be checked is checked before the first is drawn, and features on the first batch.
    Several processes, as `accelerate launch` starts them, share the work. With `output`, a run that was interrupted
    continues.

    Args:
        model: a model; or a pipeline, whose scheduler and autoencoder it is measured with.
        batches: held-out batches, a finite number, as for training. The denoising loss draws its timesteps and noise
            from `seed` alone, so models measured on the same batches are compared on the same noise. For samples:
            their prompts, labels or lines of metadata.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.
        metrics: of `dg.metrics`, or callables from the model to named values, such as `testbed.SampleQuality()`.
        progress: show bars; by default for samples alone.
        sampling: steps, guidance and the like.
        output: folder of the samples; None is a temporary one.
        save_npz: file to write the samples to as ADM's evaluator reads them.

    Raises:
        TrainingError: batches that do not fit the model, have no target, or are none at all.
        GraftError: metrics, conditions and settings that do not fit each other, or files that are no images.
        FileError: weights or references that are missing, a folder with other samples, a file that is there already.
        ModelError: a pipeline without a denoising model.
    """
    from diffusers import DiffusionPipeline  # brings transformers and peft

    chosen: list[Any] = list(metrics)
    if isinstance(model, DiffusionPipeline) or sampling is not None:
        conditions = [_as_number(condition) for condition in batches]
        return _evaluate_samples(model, conditions, chosen, seed, progress, sampling, output, save_npz)
    for metric in chosen:
        if isinstance(metric, SampleMetric):
            raise GraftError(
                f"{type(metric).__name__} measures samples, and a model alone draws none. Give a pipeline with "
                "prompts or class labels, or a function that draws, by sampling=dg.Sampling(draw=...)."
            )
    if output is not None or save_npz is not None:
        raise GraftError("Only samples are saved, and a model alone draws none. Give a pipeline.")
    if not isinstance(model, nn.Module):  # a compiled model is one
        require_model(model)
    observers = {id(metric): metric.start(model) for metric in chosen if isinstance(metric, PredictionError)}
    with evaluating(model):
        loss, samples = _mean_loss(model, batches, noise_scheduler, seed, bool(progress), observers.values())
        values = {"denoising_loss": loss}
        protocol: dict[str, Any] = {"samples": samples, "seed": seed, **describe_computation(model)}
        if noise_scheduler is not None:
            protocol["noise_scheduler"] = type(noise_scheduler).__name__
        for metric in chosen:
            values |= observers[id(metric)].result() if id(metric) in observers else metric(model)
            protocol.update(describe_metric(metric))
    return Scores(values, protocol)


def _mean_loss(
    model: ModelMixin,
    batches: Iterable[Batch],
    scheduler: SchedulerMixin | None,
    seed: int,
    progress: bool,
    observers: Iterable[Any],
) -> tuple[float, int]:
    """Return the denoising loss, as a mean over samples, and their number.

    Args:
        observers: shown the model's inputs and its prediction for every batch.
    """
    # uniform timesteps and every label, so that scores do not depend on settings of the training
    generator = torch.Generator().manual_seed(seed)
    noising = Noising(scheduler=scheduler, timesteps="uniform", drop_labels=False)
    total = 0.0
    samples = 0
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=hide_bar(progress)):
        noising.require_usable(model, batch)
        noised = noising(model, batch, generator)
        if noised.target is None:
            raise TrainingError('Nothing to compare with: batches need a "sample" to noise, or a "target".')
        prediction = predict(model, noised.inputs)
        for observer in observers:
            observer.update(noised.inputs, prediction)
        # batches may differ in size, so samples are weighed alike
        count = len(noised.target)
        total += denoising_loss(prediction, noised.target).item() * count
        samples += count
    if not samples:
        raise TrainingError("There were no batches to evaluate on.")
    return total / samples, samples


def _as_number(condition: Any) -> Any:
    """Return a label of a tensor or an array as a number, which can be written down; everything else as it is."""
    return condition.item() if hasattr(condition, "item") else condition


def _evaluate_samples(
    pipeline: Any,
    conditions: list[Any],
    metrics: list[Any],
    seed: int,
    progress: bool | None,
    sampling: Sampling | None,
    output: str | Path | None,
    save_npz: str | Path | None,
) -> Scores:
    model = model_of(pipeline)
    sampling = sampling or Sampling()
    # Found out now, not after all samples are drawn.
    if any(isinstance(metric, PredictionError) for metric in metrics):
        require_teacher(model)
    of_samples = [metric for metric in metrics if isinstance(metric, SampleMetric)]
    with evaluating(model):
        values, protocol = score_samples(
            pipeline,
            conditions,
            of_samples,
            sampling,
            seed=seed,
            output=output,
            save_npz=save_npz,
            progress=progress is not False,
        )
        for metric in metrics:
            if isinstance(metric, SampleMetric):
                continue
            if isinstance(metric, PredictionError):
                values |= metric.along_sampling(pipeline, conditions, sampling, seed)
            else:
                values |= metric(model)
            protocol.update(describe_metric(metric))
    return Scores(values, protocol)
