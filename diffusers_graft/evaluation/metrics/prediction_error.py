"""How far a grafted model's predictions are from its teacher's, by timestep; no data is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...errors import GraftError, StateError
from ...injection.graft import get_graft
from ...injection.install import original_running
from ...inspection import argument_names, bind_arguments, predict
from ...training.noised_batch import find_timestep_name
from ..sampling import Sampling, draw_with_pipeline, make_generator, model_of

_LARGEST = 1000  # timesteps of diffusers


@dataclass(frozen=True, kw_only=True)
class PredictionError:
    """Relative squared error |s - t|^2 / |t|^2 of the prediction, over all samples and by bucket of timesteps.

    The teacher is the model with its graft disabled. Beside held-out batches it is measured on these; beside the
    samples of a pipeline, at every step of the teacher's own sampling.

    Attributes:
        buckets: of equal width, from timestep 0 to 1,000.
        samples: how many samples of a pipeline are followed, the first ones.
    """

    needs_teacher: ClassVar[bool] = True

    buckets: int = 4
    samples: int = 16

    def __post_init__(self):
        if self.buckets < 1 or self.samples < 1:
            raise GraftError(f"Buckets and samples are counted from 1; got {self}.")

    def start(self, model: Any) -> Errors:
        """Return what takes in predictions batch by batch. Raises `StateError` for a model without a graft."""
        require_teacher(model)
        return Errors(model, self.buckets)

    def along_sampling(
        self, pipeline: Any, conditions: Sequence[Any], sampling: Sampling, seed: int
    ) -> dict[str, float]:
        """Return the errors at every step of the teacher's sampling, by name."""
        model: Any = model_of(pipeline)
        errors = self.start(model)
        chosen = range(min(self.samples, len(conditions)))
        draw = sampling.draw or draw_with_pipeline
        for start in range(0, len(chosen), sampling.batch_size):
            batch = chosen[start : start + sampling.batch_size]
            calls: list[tuple[dict[str, Any], torch.Tensor]] = []
            generators = [make_generator(seed, index) for index in batch]
            with original_running(model), _recording(model, calls):
                draw(pipeline, [conditions[index] for index in batch], generators, sampling)
            # Both see the same inputs, so that errors do not add up along the way.
            for inputs, target in calls:
                errors.add(inputs, predict(model, inputs), target)
        return errors.result()


class Errors:
    """Errors of a grafted model, gathered by timestep."""

    def __init__(self, model: Any, buckets: int):
        self.model = model
        self.buckets = buckets
        self.timesteps: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(self, inputs: dict[str, Any], prediction: torch.Tensor) -> None:
        """Compare a prediction with the teacher's for the same inputs."""
        with original_running(self.model):
            target = predict(self.model, inputs)
        self.add(inputs, prediction, target)

    def add(self, inputs: dict[str, Any], prediction: torch.Tensor, target: torch.Tensor) -> None:
        """Take in predictions [B, ...] of student and teacher for inputs with a timestep."""
        timestep = inputs.get(find_timestep_name(self.model))
        if timestep is None:
            raise GraftError("Errors are gathered by timestep, and this model is called without one.")
        prediction = prediction.flatten(1).double()
        target = target.flatten(1).double()
        # Relative, since the size of a prediction depends on the timestep.
        error = (prediction - target).square().sum(1) / target.square().sum(1)
        timestep = torch.as_tensor(timestep).double().reshape(-1).expand(len(error))
        self.timesteps.append(timestep.cpu())
        self.values.append(error.cpu())

    def result(self) -> dict[str, float]:
        """Return the mean errors by name; buckets without a sample are absent."""
        values = torch.cat(self.values)
        timesteps = torch.cat(self.timesteps)
        # Some families are told timesteps from 0 to 1.
        if timesteps.max() <= 1:
            timesteps = timesteps * _LARGEST
        width = _LARGEST / self.buckets
        bucket = (timesteps / width).long().clamp(max=self.buckets - 1)
        errors = {"prediction_error": values.mean().item()}
        for number in bucket.unique().tolist():
            name = f"prediction_error_{number * width:.0f}_{(number + 1) * width:.0f}"
            errors[name] = values[bucket == number].mean().item()
        return errors


@contextlib.contextmanager
def _recording(model: Any, calls: list[tuple[dict[str, Any], torch.Tensor]]) -> Iterator[None]:
    """Record arguments and prediction of every call of a model inside."""

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        inputs = bind_arguments(argument_names(type(model)), args, kwargs)
        calls.append((inputs, output if isinstance(output, torch.Tensor) else output[0]))

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def require_teacher(model: Any) -> None:
    """Raise `StateError` for a model that is not grafted, and so has no teacher in it."""
    if get_graft(model) is None:
        raise StateError(
            "The teacher is the model with its graft disabled, and this model has none. Install one, or leave out the "
            "metrics that compare with the teacher."
        )
