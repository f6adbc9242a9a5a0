"""Settings that both stages share: optimizer, schedule, precision, noise, checkpoints and logs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch
from diffusers import ModelMixin
from diffusers.optimization import SchedulerType, get_scheduler

from ..core.sites import Sites
from ..errors import TrainingError, UnknownNameError
from .argument_names import require_known_settings
from .muon import MuonWithAdamW

PRECISIONS = ("no", "bf16", "fp16")
Settings = TypeVar("Settings")

# They change no weight, so a resumed run may change them.
_WITHOUT_EFFECT_ON_WEIGHTS = ("save_every", "keep", "log_every", "progress", "trackers")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings that both stages share.

    Attributes:
        steps: optimizer steps.
        lr, warmup: peak learning rate, and the steps in which it is reached linearly. None is 0.2 / width of the model
            in stage one and 0.1 / width in stage two (`rate_of_width`), and three times that with Muon.
        schedule, schedule_args: the schedule after the warm-up, by its name in `diffusers.optimization`, and its
            settings.
        optimizer, optimizer_args: any optimizer of `torch.optim` by name, and its settings. `"Muon"` moves the weights
            of linear layers in blocks, as far as AdamW would, and AdamW moves the rest (arXiv 2502.16982).
        weight_decay: of matrices; biases, norms and other vectors are spared.
        max_grad_norm: gradients are clipped to this norm.
        accumulate: batches of one optimizer step.
        precision: `"no"`, or mixed: `"bf16"`, `"fp16"` (weights stay as they are); None is what `accelerate launch
            --mixed_precision` says, and else `"no"`.
        timesteps: of the noise, see `diffusers_graft.training.noised_batch.Noising`.
        prompt_dropout: rate at which the null prompt, if given, takes the place of a prompt; 0.1 is what most models
            were trained with. Class labels are dropped at the model's own rate.
        seed: of the noise, and of new LoRA layers.
        evaluate_every, held_out_batches: steps between two evaluations, and batches of each. With held-out batches,
            there is one before the first step and one after the last, too; the weights that were best are the result.
        save_every, keep: steps between two checkpoints in the output folder, and how many checkpoints are kept.
        log_every: steps between two rows of `training.jsonl` and two lines of the log.
        trackers: of accelerate, by name; None takes tensorboard where it is installed and there is an output folder.
        progress: show a bar on a terminal, and lines elsewhere.
    """

    # Chosen at width 96 (examples/ablation); at DiT-XL's 1,152 it is about the paper's 1e-4.
    rate_of_width: ClassVar[float] = 0.1
    # Settings that came after the first checkpoints, and what those were trained with.
    came_later: ClassVar[Mapping[str, Any]] = {}

    steps: int = 500
    lr: float | None = None
    warmup: int = 20
    schedule: str = "cosine"
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
    evaluate_every: int = 100
    held_out_batches: int = 4
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    trackers: tuple[str, ...] | None = None
    progress: bool = True

    def __new__(cls, *args: Any, **settings: Any):
        require_known_settings(cls, settings)
        return super().__new__(cls)

    def __post_init__(self):
        # The class is frozen, so a default that comes from the launch is set past it.
        if self.precision is None:
            object.__setattr__(self, "precision", os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
        require_one_of("precision", self.precision, PRECISIONS)
        require_one_of("schedule", self.schedule, [kind.value for kind in SchedulerType])
        require_one_of("optimizer", self.optimizer, [*list_optimizers(), "Muon"])
        counts = (self.steps, self.accumulate, self.save_every, self.keep, self.log_every)
        counts += (self.evaluate_every, self.held_out_batches)
        lr = 1.0 if self.lr is None else self.lr
        if not all(isinstance(value, int | float) for value in (lr, self.max_grad_norm, self.prompt_dropout)):
            raise TrainingError(f"A learning rate, a norm and a rate are numbers; got {self}.")
        if not all(isinstance(count, int) for count in (*counts, self.warmup, self.seed)) or self.warmup < 0:
            raise TrainingError(f"Steps and a seed are whole numbers, those of the warm-up from zero; got {self}.")
        if not (min(counts) >= 1 and 0 < lr < math.inf):
            raise TrainingError(
                f"Training needs at least one step of everything and a positive learning rate; got {self}."
            )
        if not self.max_grad_norm > 0 or not 0 <= self.prompt_dropout <= 1:
            raise TrainingError(
                f"A gradient is clipped to a norm above zero, and a rate lies from 0 to 1; got {self}."
            )
        # Raises for settings that the schedule does not take, before hours of training.
        self.lr_factors()

    def for_model(self, model: ModelMixin, sites: Sites) -> Self:
        """Return the settings with numbers where the model decides them: the learning rate by its width."""
        if self.lr is not None:
            return self
        width = max(site.width for site in sites)
        rate = self.rate_of_width / width
        if self.optimizer == "Muon":
            rate *= 3
        return dataclasses.replace(self, lr=float(f"{rate:.3g}"))

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, JSON-able; numbers that are not finite, which JSON lacks, as text."""
        return json.loads(json.dumps(asdict(self), default=str), parse_constant=str)

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the weights: a run is resumed only with the same ones."""
        return {name: value for name, value in self.to_dict().items() if name not in _WITHOUT_EFFECT_ON_WEIGHTS}

    def make_optimizer(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Create the optimizer of groups of parameters. Raises `TrainingError` for settings that it does not take."""
        cls = MuonWithAdamW if self.optimizer == "Muon" else getattr(torch.optim, self.optimizer)
        settings = {"lr": lr, "weight_decay": self.weight_decay, **self.optimizer_args}
        if not settings["weight_decay"] and "weight_decay" not in inspect.signature(cls).parameters:
            del settings["weight_decay"]  # Rprop has none
        elif settings["weight_decay"]:
            groups = [half for group in groups for half in _spare_vectors(group)]
        try:
            return cls(groups, **settings)
        except (TypeError, ValueError, IndexError) as error:
            raise TrainingError(f"torch.optim.{self.optimizer} does not take these settings: {error}.") from error

    def lr_factors(self) -> Callable[[int], float]:
        """Return the factor on the learning rate at a step; it is never zero.

        The schedule is read one step ahead and ends one step late, so the first and the last step move something.
        Raises `TrainingError` for settings that the schedule does not take.
        """
        # diffusers makes schedules for an optimizer, of which only the factors are used.
        dummy = torch.optim.SGD([torch.zeros(1)], lr=1.0 if self.lr is None else self.lr)
        settings = {"num_warmup_steps": self.warmup, "num_training_steps": self.steps + 1, **self.schedule_args}
        try:
            factor = get_scheduler(self.schedule, dummy, **settings).lr_lambdas[0]
        except (TypeError, ValueError, AttributeError) as error:
            raise TrainingError(f"The schedule {self.schedule} does not take these settings: {error}.") from error
        return lambda step: factor(step + 1)


def config_or_default(config: Any, kind: type[Settings]) -> Settings:
    """Return the settings given, or the default ones. Raises `TrainingError` for settings of another verb."""
    if not isinstance(config, kind | None):
        raise TrainingError(f"The settings here are a dg.{kind.__name__}, or None for the usual ones; got {config!r}.")
    return config or kind()


def require_one_of(what: str, name: object, available: Iterable[str]) -> None:
    """Raise `UnknownNameError` unless `name` is one of those available."""
    available = list(available)
    if name not in available:
        raise UnknownNameError(what, name, available)


def list_optimizers() -> list[str]:
    """Return the optimizers of torch that need nothing but gradients, by name."""
    found = (
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    )
    # LBFGS evaluates the loss several times a step, SparseAdam takes sparse gradients.
    return sorted(set(found) - {"Optimizer", "LBFGS", "SparseAdam"})


def _spare_vectors(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Divide a group into parameters that decay and vectors (biases, norms, scales), whose size means something."""
    matrices = [parameter for parameter in group["params"] if parameter.ndim > 1]
    vectors = [parameter for parameter in group["params"] if parameter.ndim <= 1]
    return [{**group, "params": matrices}, {**group, "params": vectors, "weight_decay": 0.0}]
