"""What was measured of a model, and how."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, is_dataclass
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

Metric = Callable[[ModelMixin], dict[str, float]]


@dataclass(frozen=True)
class Scores:
    """Measured values by name, with the protocol that made them; what was not measured is absent."""

    values: dict[str, float]
    protocol: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; numbers that are not finite, which JSON lacks, as text."""
        return json.loads(json.dumps(asdict(self), default=str), parse_constant=str)

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self.values.items())


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

    Raises `TrainingError` for batches that do not fit the model, or without a target, or none at all; `ModelError` for
    a pipeline.
    """
    if not isinstance(model, nn.Module):  # a compiled model is one
        require_model(model)
    generator = torch.Generator().manual_seed(seed)
    noising = Noising(scheduler=noise_scheduler, timesteps="uniform", drop_labels=False)
    total, samples = 0.0, 0
    with evaluating(model):
        for batch in tqdm(batches, desc="evaluating", unit="batch", disable=None if progress else True):
            noising.require_usable(model, batch)
            noised = noising(model, batch, generator)
            if noised.target is None:
                raise TrainingError('Nothing to compare with: batches need a "sample" to noise, or a "target".')
            count = len(noised.target)
            total += denoising_loss(predict(model, noised.inputs), noised.target).item() * count
            samples += count
        if not samples:
            raise TrainingError("There were no batches to evaluate on.")
        values = {"denoising_loss": total / samples}
        protocol = {"samples": samples, "seed": seed}
        protocol |= {} if noise_scheduler is None else {"noise_scheduler": type(noise_scheduler).__name__}
        for metric in metrics:
            values.update(metric(model))
            settings = asdict(metric) if is_dataclass(metric) else {}
            protocol.update({f"{type(metric).__name__}.{name}": value for name, value in settings.items()})
    return Scores(values, protocol)
