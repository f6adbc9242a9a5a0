"""Buckets of timesteps: the share of the noise schedule that each sample of a running forward is at."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin

from ..errors import GraftError
from ..training.noised_batch import NoisedBatch, find_timestep_name


class TimestepBuckets:
    """Equal parts of a noise schedule, and the parts that the samples of the running forward are in.

    Attributes:
        count: number of buckets.
        samples: seen so far in each.

    Raises `GraftError` for less than one bucket.
    """

    def __init__(self, count: int):
        if type(count) is not int or count < 1:
            raise GraftError(f"Timesteps are divided into 1 bucket or more; got {count!r}. Try 4.")
        self.count = count
        self.samples = [0] * count
        self._current: list[int] = []

    @property
    def bounds(self) -> list[float]:
        """Edges of the buckets, from 0, the clean end of the schedule, to 1."""
        return [edge / self.count for edge in range(self.count + 1)]

    def enter(self, model: ModelMixin, noised: NoisedBatch, scheduler: SchedulerMixin | None) -> None:
        """Note the samples of the forward that comes next."""
        shares = _schedule_shares(model, noised, scheduler)
        places = (shares * self.count).long().clamp(0, self.count - 1)
        self._current = places.tolist()
        for place in self._current:
            self.samples[place] += 1

    def of(self, rows: int) -> list[int]:
        """Return the bucket of each of `rows` rows: samples, or several rows a sample, such as a video's frames."""
        repeats = max(1, rows // len(self._current))
        repeated = [bucket for bucket in self._current for _ in range(repeats)]
        # Rows that are no multiple of the samples cannot be told apart.
        return (repeated * rows)[:rows]


def _schedule_shares(model: ModelMixin, noised: NoisedBatch, scheduler: SchedulerMixin | None) -> torch.Tensor:
    """Return the place of every sample on the noise schedule, from 0 to 1: [B], on the CPU.

    Of batches that hold arguments of the model it is the model's own timestep: a share of 1, or of 1,000 steps.
    """
    timestep: Any = noised.timestep
    steps = 1.0
    if timestep is not None:
        assert isinstance(scheduler, ConfigMixin)  # nothing else makes timesteps
        steps = float(scheduler.config["num_train_timesteps"])
    else:
        timestep = noised.inputs.get(find_timestep_name(model))
        if timestep is None:
            return torch.zeros(noised.count)
    timestep = torch.as_tensor(timestep).detach().float().cpu()
    if noised.timestep is None and timestep.max() > 1:
        steps = 1000.0
    if timestep.dim() > 1:
        # A timestep for each frame: their mean.
        timestep = timestep.flatten(1).mean(1)
    return (timestep / steps).expand(noised.count)
