"""From clean samples to what a denoiser is trained on: noised inputs and the target of the prediction."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding

from ..errors import TrainingError, UnknownNameError
from ..inspection.families import argument_names
from .batches import Batch
from .config import TrainingConfig
from .noise import add_noise, convert_for_model, is_flow, require_known_scheduler


@dataclass(frozen=True)
class NoisedBatch:
    """One batch to train on.

    Attributes:
        inputs: arguments of the model, the noised sample first.
        target: what it should predict; None where that is unknown.
        sample: the clean sample; None where the batch held model arguments.
        timestep: as the scheduler counts, where models may be told something else; None as well.
    """

    inputs: dict[str, Any]
    target: torch.Tensor | None
    sample: torch.Tensor | None = None
    timestep: torch.Tensor | None = None

    @property
    def noisy(self) -> torch.Tensor:
        """The noised sample, whatever the model calls it."""
        return next(iter(self.inputs.values()))

    @property
    def count(self) -> int:
        """Samples in the batch."""
        return len(self.noisy)


@dataclass(frozen=True, kw_only=True)
class Noising:
    """How clean samples become noised ones (paper, Eq. 1 and 2: timesteps and noise redrawn every step).

    Attributes:
        scheduler: diffusers' noise scheduler of the model; None where batches are complete model arguments.
        timesteps: `"auto"` (uniform for DDPM, logit-normal for flow matching), `"uniform"` or `"logit_normal"`.
        drop_labels: drop class labels at the model's own rate, for classifier-free guidance.
        null_prompt, prompt_dropout: conditioning of no prompt (one sample of each argument), and the rate at which it
            takes the place of a sample's own.
    """

    scheduler: SchedulerMixin | None = None
    timesteps: str = "auto"
    drop_labels: bool = True
    null_prompt: Mapping[str, Any] | None = None
    prompt_dropout: float = 0.1

    def __post_init__(self):
        if self.scheduler is not None:
            require_known_scheduler(self.scheduler)
        choices = ("auto", "uniform", "logit_normal")
        if self.timesteps not in choices:
            raise UnknownNameError("way to draw timesteps", self.timesteps, choices)
        nulls = {} if self.null_prompt is None else self.null_prompt
        if not (isinstance(nulls, Mapping) and all(isinstance(null, torch.Tensor) for null in nulls.values())):
            raise TrainingError(f"A null prompt is a dict of tensors, one sample of each; got {self.null_prompt!r}.")

    @classmethod
    def from_config(
        cls, config: TrainingConfig, scheduler: SchedulerMixin | None, null_prompt: Mapping[str, Any] | None
    ) -> Noising:
        """As the settings of a stage say."""
        how = {"timesteps": config.timesteps, "prompt_dropout": config.prompt_dropout}
        return cls(scheduler=scheduler, null_prompt=null_prompt, **how)

    def __call__(self, model: ModelMixin, batch: Batch, generator: torch.Generator) -> NoisedBatch:
        """Noise one batch; all randomness comes from `generator` (on CPU). Raises `TrainingError` for one that does
        not fit.
        """
        self._require_fit(model, batch)
        inputs, noisy = {name: _onto(value, model) for name, value in batch.items()}, argument_names(type(model))[0]
        if not _is_clean(model, batch):
            target = inputs.pop("target", None)
            return NoisedBatch({noisy: inputs.pop(noisy), **inputs}, target)
        sample = inputs.pop("sample")
        epsilon = torch.randn(sample.shape, generator=generator).to(sample)
        share = self._shares(len(sample), generator)
        if self.drop_labels and "class_labels" in inputs:
            inputs["class_labels"] = drop_class_labels(model, inputs["class_labels"], generator)
        if self.null_prompt is not None and self.prompt_dropout:
            dropped = torch.rand(len(sample), generator=generator) < self.prompt_dropout
            inputs |= {name: _replaced(name, inputs[name], null, dropped) for name, null in self.null_prompt.items()}
        noised, timestep, target = add_noise(self.scheduler, sample, epsilon, share)
        told, wanted = convert_for_model(model, self.scheduler, timestep, target)
        return NoisedBatch({noisy: noised, find_timestep_name(model): told, **inputs}, wanted, sample, timestep)

    def require_usable(self, model: ModelMixin, *batches: Batch) -> None:
        """Raise `TrainingError` for batches that the model could not be called with, once they are noised."""
        for batch in batches:
            self._require_fit(model, batch)
        if _label_embedding(model) is not None and not all("class_labels" in batch for batch in batches):
            raise TrainingError(f"The batch does not fit {type(model).__name__}: it needs class_labels, a tensor.")

    def _require_fit(self, model: ModelMixin, batch: Batch) -> None:
        if not isinstance(batch, Mapping):
            raise TrainingError(
                f"A batch is a dict: a clean sample, or the model's arguments; got {type(batch).__name__}."
            )
        noisy, clean = argument_names(type(model))[0], _is_clean(model, batch)
        if clean and self.scheduler is None:
            raise TrainingError(
                'Batches hold clean samples (the key "sample"), which need noise: pass noise_scheduler=, the scheduler of '
                "the model's pipeline."
            )
        given = {*batch} - {"sample"} | {noisy, find_timestep_name(model)} if clean else {*batch} - {"target"}
        misfits = zip(("needs", "does not take"), _misfit(model, given), strict=True)
        if words := [f"it {verb} {', '.join(sorted(map(str, names)))}" for verb, names in misfits if names]:
            raise TrainingError(f"The batch does not fit {type(model).__name__}: {'; '.join(words)}.")
        for name in ("sample", *(self.null_prompt or ())) if clean else (noisy,):
            if not isinstance(batch.get(name), torch.Tensor if clean else torch.Tensor | list):
                raise TrainingError(f"The {name} of a batch is a tensor; got {type(batch.get(name)).__name__}.")
        noised = batch["sample" if clean else noisy]
        if not len(noised) or (clean and not noised.is_floating_point()):
            raise TrainingError(f"A batch holds samples, clean ones in floating point; got {noised}.")
        if "class_labels" in batch:
            _require_labels(model, batch["class_labels"], len(noised))

    def _shares(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Where in the noise schedule each sample lies, from 0 (clean) to 1: [B]."""
        logit_normal = self.timesteps == "logit_normal" or (self.timesteps == "auto" and is_flow(self.scheduler))
        own = {"generator": generator}
        return torch.randn(count, **own).sigmoid() if logit_normal else torch.rand(count, **own)


def find_timestep_name(model: ModelMixin) -> str:
    """What a model calls its timestep."""
    return next((name for name in argument_names(type(model)) if name in ("timesteps", "t")), "timestep")


def _is_clean(model: ModelMixin, batch: Batch) -> bool:
    """Whether a batch holds a clean sample; beside a timestep, it is the noised one of a model that calls it so."""
    return "sample" in batch and find_timestep_name(model) not in batch


def _misfit(model: ModelMixin, given: set[str]) -> tuple[set[str], set[str]]:
    """Names that the forward of a model needs and that are not given, and given ones that it does not take."""
    _, *takes = inspect.signature(type(model).forward).parameters.values()
    needs = {one.name for one in takes if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in takes)
    return needs - given, set() if takes_any else given - {one.name for one in takes}


def _replaced(name: str, value: torch.Tensor, null: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    null = null.to(value)
    if null.shape[1:] != value.shape[1:]:
        raise TrainingError(
            f"The null prompt's {name} is {tuple(null.shape)}, one sample of the batch {tuple(value.shape[1:])}: encode both "
            "to the same length."
        )
    return torch.where(dropped.to(value.device).view(-1, *[1] * (value.ndim - 1)), null, value)


def drop_class_labels(model: ModelMixin, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels with the null label at the model's own rate, once for the whole sample.

    diffusers' DiT would drop them in train() in every block by its own dice, which trains no unconditional model.
    """
    embedding = _label_embedding(model)
    if embedding is None or not embedding.dropout_prob:
        return labels
    dropped = torch.rand(len(labels), generator=generator) < embedding.dropout_prob
    return labels.masked_fill(dropped.to(labels.device), embedding.num_classes)


def _require_labels(model: ModelMixin, labels: Any, count: int) -> None:
    if (embedding := _label_embedding(model)) is None:
        return
    classes = embedding.embedding_table.num_embeddings
    sound = (
        isinstance(labels, torch.Tensor) and labels.dtype in (torch.int32, torch.int64) and labels.shape == (count,)
    )
    if not sound or not 0 <= labels.min() <= labels.max() < classes:
        needs = f"it needs class_labels, a tensor of {count} whole numbers below {classes}"
        raise TrainingError(f"The batch does not fit {type(model).__name__}: {needs}.")


def _label_embedding(model: ModelMixin) -> LabelEmbedding | None:
    return next((module for module in model.modules() if isinstance(module, LabelEmbedding)), None)


def _onto(value: Any, model: ModelMixin) -> Any:
    if isinstance(value, Mapping):
        return {name: _onto(item, model) for name, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
