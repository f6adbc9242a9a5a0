"""What both stages can be told: one set of settings, the same names in each."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from ..errors import TrainingError, UnknownNameError

PRECISIONS = ("no", "bf16", "fp16")
Settings = TypeVar("Settings")
SELDOM = (
    "save_every",
    "keep",
    "log_every",
    "progress",
    "trackers",
)  # change no weight, so a resumed run may change them


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings that both stages share.

    Attributes:
        steps: optimiser steps.
        lr, warmup: peak learning rate, reached linearly in so many steps.
        schedule, schedule_args: what follows the warm-up: a schedule of `diffusers.optimization` by name, and its
            settings.
        optimizer, optimizer_args: any optimiser of `torch.optim` by name, and its settings.
        max_grad_norm: clipping.
        accumulate: batches of one optimiser step.
        precision: `"no"`, or mixed: `"bf16"`, `"fp16"` (weights stay as they are); None is what `accelerate launch
            --mixed_precision` says, and else `"no"`.
        timesteps: of the noise, see `diffusers_graft.training.noised_batch.Noising`.
        prompt_dropout: rate at which a prompt is dropped, where a null prompt is given; 0.1 is what most models were
            trained with. Class labels are dropped at the model's own rate.
        seed: of the noise.
        save_every, keep: with an output folder, a checkpoint every so many steps, and how many of them stay.
        log_every: steps of a row of `training.jsonl`.
        trackers: of accelerate, by name; None takes tensorboard where it is installed and there is an output folder.
        progress: show a bar, on a terminal.
    """

    steps: int = 500
    lr: float = 1e-4
    warmup: int = 20
    schedule: str = "constant_with_warmup"
    schedule_args: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "AdamW"
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    accumulate: int = 1
    precision: str | None = None
    timesteps: str = "auto"
    prompt_dropout: float = 0.1
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    trackers: tuple[str, ...] | None = None
    progress: bool = True

    def __post_init__(self):
        if self.precision is None:
            object.__setattr__(self, "precision", os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
        one_of("precision", self.precision, PRECISIONS)
        one_of("schedule", self.schedule, [kind.value for kind in SchedulerType])
        one_of("optimizer", self.optimizer, optimizers())
        counts = (self.steps, self.accumulate, self.save_every, self.keep, self.log_every)
        if not all(isinstance(value, int | float) for value in (self.lr, self.max_grad_norm, self.prompt_dropout)):
            raise TrainingError(f"A learning rate, a norm and a rate are numbers; got {self}.")
        if not all(isinstance(count, int) for count in (*counts, self.warmup, self.seed)) or self.warmup < 0:
            raise TrainingError(f"Steps and a seed are whole numbers, those of the warm-up from zero; got {self}.")
        if not (min(counts) >= 1 and 0 < self.lr < math.inf):
            raise TrainingError(
                f"Training needs at least one step of everything and a positive learning rate; got {self}."
            )
        if not self.max_grad_norm > 0 or not 0 <= self.prompt_dropout <= 1:
            raise TrainingError(
                f"A gradient is clipped to a norm above zero, and a rate lies from 0 to 1; got {self}."
            )
        self.lr_factors()

    def to_dict(self) -> dict[str, Any]:
        """Every setting, JSON-able; numbers that are not finite, which JSON lacks, as text."""
        return json.loads(json.dumps(asdict(self), default=str), parse_constant=str)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the weights."""
        return {name: value for name, value in self.to_dict().items() if name not in SELDOM}

    def make_optimizer(self, parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Raises `TrainingError` for settings that the optimiser does not take."""
        cls = getattr(torch.optim, self.optimizer)
        decays = self.weight_decay or "weight_decay" in inspect.signature(cls).parameters  # Rprop knows none
        settings = {"weight_decay": self.weight_decay} if decays else {}
        try:
            return cls(list(parameters), lr=lr, **settings | self.optimizer_args)
        except (TypeError, ValueError, IndexError) as error:
            raise TrainingError(f"torch.optim.{self.optimizer} does not take these settings: {error}.") from error

    def lr_factors(self) -> Callable[[int], float]:
        """Factor on the learning rate at a step, never zero: the schedule is read one step ahead and ends one step
        late.

        Raises `TrainingError` for settings that the schedule does not take.
        """
        dummy = torch.optim.SGD([torch.zeros(1)], lr=self.lr)
        settings = {"num_warmup_steps": self.warmup, "num_training_steps": self.steps + 1, **self.schedule_args}
        try:
            factor = get_scheduler(self.schedule, dummy, **settings).lr_lambdas[0]
        except (TypeError, ValueError, AttributeError) as error:
            raise TrainingError(f"The schedule {self.schedule} does not take these settings: {error}.") from error
        return lambda step: factor(step + 1)


def or_usual(config: Any, kind: type[Settings]) -> Settings:
    """The settings given, or the usual ones. Raises `TrainingError` for those of something else."""
    if not isinstance(config, kind | None):
        raise TrainingError(f"The settings here are a dg.{kind.__name__}, or None for the usual ones; got {config!r}.")
    return config or kind()


def one_of(what: str, name: str, available: Iterable[str]) -> None:
    """Raise `UnknownNameError` unless `name` is one of those available."""
    available = list(available)
    if name not in available:
        raise UnknownNameError(what, name, available)


def optimizers() -> list[str]:
    """Optimisers of torch that need nothing but gradients."""
    found = (
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    )
    return sorted(set(found) - {"Optimizer", "LBFGS", "SparseAdam"})
