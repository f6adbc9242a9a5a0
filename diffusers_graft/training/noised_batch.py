"""Noised batches: clean samples become inputs of a denoiser and the target of its prediction."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding

from ..errors import TrainingError, UnknownNameError
from ..inspection.families import argument_names, context_of, family_of
from .batches import Batch, Share, Shared, own_part
from .config import TrainingConfig
from .distributed import local_share, process_state
from .noise import (
    DENSITIES,
    add_noise,
    convert_for_model,
    draw_shares,
    find_convention,
    find_shift,
    require_known_scheduler,
)


@dataclass(frozen=True)
class NoisedBatch:
    """Arguments of a model and what it should predict from them.

    Attributes:
        inputs: arguments of the model, the noised sample first.
        target: what it should predict; None where that is unknown.
        sample, noise: the clean sample and its noise; None where the batch held model arguments.
        timestep: as the scheduler counts, which may differ from what the model is given; None where the batch held
            model arguments.
        shared: names of arguments that are the same for all samples.
        is_share: these are the samples of this process alone.
    """

    inputs: dict[str, Any]
    target: torch.Tensor | None
    sample: torch.Tensor | None = None
    timestep: torch.Tensor | None = None
    shared: frozenset[str] = frozenset()
    is_share: bool = False
    noise: torch.Tensor | None = None

    @property
    def noisy(self) -> torch.Tensor:
        """The noised sample, whatever the model calls it."""
        return next(iter(self.inputs.values()))

    @property
    def count(self) -> int:
        """Samples in the batch, of all processes together."""
        if self.is_share:
            return len(self.noisy) * process_state().num_processes
        return len(self.noisy)

    def local_share(self) -> NoisedBatch:
        """Return the samples of this process. Raises `TrainingError` where they cannot be divided evenly."""
        if self.is_share:
            return self
        inputs = {}
        for name, value in self.inputs.items():
            # As many tokens as samples are no reason to divide the positions of tokens.
            inputs[name] = value if name in self.shared else local_share(value, self.count)
        return NoisedBatch(
            inputs,
            local_share(self.target, self.count),
            local_share(self.sample, self.count),
            local_share(self.timestep, self.count),
            self.shared,
            noise=local_share(self.noise, self.count),
        )


@dataclass(frozen=True, kw_only=True)
class Noising:
    """Noising of clean samples (paper, Eq. 1 and 2: timesteps and noise are drawn anew every step).

    Attributes:
        scheduler: diffusers' noise scheduler of the model; None where batches are complete model arguments.
        timesteps: `"auto"` (as the model was trained, see `diffusers_graft.training.noise`), `"uniform"` or
            `"logit_normal"`.
        drop_labels: drop class labels at the rate of the model, for classifier-free guidance.
        null_prompt, prompt_dropout: conditioning of no prompt (one sample of each argument), and the rate at which it
            takes the place of the prompt of a sample.

    Raises:
        TrainingError: a scheduler under which it is not known how models are trained, or a null prompt that is none.
        UnknownNameError: another way to draw timesteps.
    """

    scheduler: SchedulerMixin | None = None
    timesteps: str = "auto"
    drop_labels: bool = True
    null_prompt: Mapping[str, Any] | None = None
    prompt_dropout: float = 0.1

    def __post_init__(self):
        if self.scheduler is not None:
            require_known_scheduler(self.scheduler)
        if self.timesteps not in DENSITIES:
            raise UnknownNameError("way to draw timesteps", self.timesteps, DENSITIES)
        if self.null_prompt is None:
            return
        is_dict = isinstance(self.null_prompt, Mapping)
        if not is_dict or not all(isinstance(null, torch.Tensor) for null in self.null_prompt.values()):
            raise TrainingError(f"A null prompt is a dict of tensors, one sample of each; got {self.null_prompt!r}.")

    @classmethod
    def from_config(
        cls, config: TrainingConfig, scheduler: SchedulerMixin | None, null_prompt: Mapping[str, Any] | None
    ) -> Noising:
        """Create the noising that the settings of a stage describe."""
        return cls(
            scheduler=scheduler,
            null_prompt=null_prompt,
            timesteps=config.timesteps,
            prompt_dropout=config.prompt_dropout,
        )

    def __call__(self, model: ModelMixin, batch: Batch, generator: torch.Generator) -> NoisedBatch:
        """Noise one batch.

        Args:
            generator: on CPU; all randomness comes from it.

        Raises `TrainingError` for a batch that does not fit the model.
        """
        self._require_fit(model, batch)
        inputs = {name: _move(value, model) for name, value in batch.items()}
        shared = frozenset(name for name, value in batch.items() if isinstance(value, Shared))
        noisy_name = argument_names(type(model))[0]
        is_share = isinstance(batch, Share)
        if not _is_clean(model, batch):
            target = inputs.pop("target", None)
            return NoisedBatch(
                {noisy_name: inputs.pop(noisy_name), **inputs}, target, shared=shared, is_share=is_share
            )
        sample = inputs.pop("sample")
        # The order of these draws is part of what a seed means: a run that is resumed repeats it. They are on the CPU,
        # whose numbers are the same on every machine.
        count = _count_all(sample, is_share)
        epsilon = torch.randn((count, *sample.shape[1:]), generator=generator)
        tokens = _count_tokens(model, {noisy_name: sample, **inputs})
        share = draw_shares(model, self.scheduler, count, generator, self.timesteps, tokens=tokens)
        if is_share:
            # Drawn for the whole batch all the same, so that a run does not depend on the number of processes.
            epsilon = own_part(epsilon)
            share = own_part(share)
        epsilon = epsilon.to(sample)
        if self.drop_labels and "class_labels" in inputs:
            labels = inputs["class_labels"]
            inputs["class_labels"] = drop_class_labels(model, labels, generator, is_share=is_share)
        if self.null_prompt is not None and self.prompt_dropout:
            dropped = _draw_dropped(sample, self.prompt_dropout, generator, is_share)
            for name, null in self.null_prompt.items():
                inputs[name] = _replace_dropped(name, inputs[name], null, dropped)
        shift = find_shift(model, self.scheduler, tokens)
        noised, timestep, target = add_noise(self.scheduler, sample, epsilon, share, shift=shift)
        model_time, model_target = convert_for_model(model, self.scheduler, noised, timestep, target, share=share)
        # Z-Image and its like take samples of different sizes, so a list even of equal ones.
        if find_convention(model).takes_list:
            noised = list(noised)
        arguments = {noisy_name: noised, find_timestep_name(model): model_time, **inputs}
        return NoisedBatch(arguments, model_target, sample, timestep, shared, is_share, epsilon)

    def require_usable(self, model: ModelMixin, *batches: Batch) -> None:
        """Raise `TrainingError` for batches that the model could not be called with, once they are noised."""
        for batch in batches:
            self._require_fit(model, batch)
        # DiT's labels are optional in its signature alone: without them its forward ends in an error of torch.
        if _find_label_embedding(model) is not None and not all("class_labels" in batch for batch in batches):
            raise TrainingError(f"The batch does not fit {type(model).__name__}: it needs class_labels, a tensor.")

    def _require_fit(self, model: ModelMixin, batch: Batch) -> None:
        if not isinstance(batch, Mapping):
            raise TrainingError(
                f"A batch is a dict: a clean sample, or the model's arguments; got {type(batch).__name__}."
            )
        _require_names(model, batch, has_scheduler=self.scheduler is not None)
        if _is_clean(model, batch):
            noised_name = "sample"
            kinds: Any = torch.Tensor
            tensors = ["sample", *(self.null_prompt or ())]
        else:
            noised_name = argument_names(type(model))[0]
            kinds = torch.Tensor | list  # some models take a list of samples
            tensors = [noised_name]
        for name in tensors:
            if not isinstance(batch.get(name), kinds):
                raise TrainingError(f"The {name} of a batch is a tensor; got {type(batch.get(name)).__name__}.")
        noised = batch[noised_name]
        if not len(noised) or (noised_name == "sample" and not noised.is_floating_point()):
            raise TrainingError(f"A batch holds samples, clean ones in floating point; got {noised}.")
        if "class_labels" in batch:
            _require_labels(model, batch["class_labels"], len(noised))


def find_timestep_name(model: ModelMixin) -> str:
    """Return the name of a model's timestep argument."""
    return next((name for name in argument_names(type(model)) if name in ("timesteps", "t")), "timestep")


def drop_class_labels(
    model: ModelMixin, labels: torch.Tensor, generator: torch.Generator, *, is_share: bool = False
) -> torch.Tensor:
    """Return labels of which some are replaced by the null label, at the rate of the model.

    diffusers' DiT would draw anew in every block in training mode, which trains no unconditional model.
    """
    embedding = _find_label_embedding(model)
    # Without dropout in training there is no null label in the table.
    if embedding is None or not embedding.dropout_prob:
        return labels
    dropped = _draw_dropped(labels, embedding.dropout_prob, generator, is_share)
    return labels.masked_fill(dropped.to(labels.device), embedding.num_classes)


def _draw_dropped(values: torch.Tensor, rate: float, generator: torch.Generator, is_share: bool) -> torch.Tensor:
    """Return which samples lose their conditioning: [B], on CPU."""
    dropped = torch.rand(_count_all(values, is_share), generator=generator) < rate
    return own_part(dropped) if is_share else dropped


def _count_tokens(model: ModelMixin, inputs: dict[str, Any]) -> int | None:
    """Return the number of tokens of an image, None where arguments do not tell it or nothing depends on it."""
    convention = find_convention(model)
    if not convention.shifts_by_tokens and convention.usual_tokens is None:
        return None
    grid = context_of(model, family_of(model), inputs).grid
    return None if grid is None else grid.tokens


def _count_all(values: torch.Tensor, is_share: bool) -> int:
    """Return the number of samples of a whole batch, from this process's values."""
    if is_share:
        return len(values) * process_state().num_processes
    return len(values)


def _is_clean(model: ModelMixin, batch: Batch) -> bool:
    """Return whether a batch holds a clean sample; beside a timestep, `sample` is the noised input of a UNet."""
    return "sample" in batch and find_timestep_name(model) not in batch


def _require_names(model: ModelMixin, batch: Batch, *, has_scheduler: bool) -> None:
    """Raise `TrainingError` for a batch that lacks arguments of the model, or has others."""
    given = set(batch)
    if _is_clean(model, batch):
        if not has_scheduler:
            raise TrainingError(
                'Batches hold clean samples (the key "sample"), which need noise: pass noise_scheduler=, the '
                "scheduler of the model's pipeline."
            )
        if find_timestep_name(model) not in argument_names(type(model)):
            raise TrainingError(
                f"{type(model).__name__} takes no timestep, so no noise scheduler can noise a sample for it: give "
                "batches of its complete arguments, with the target of stage two among them."
            )
        given = given - {"sample"} | {argument_names(type(model))[0], find_timestep_name(model)}
    else:
        given = given - {"target"}
    missing, unknown = _compare_names(model, given)
    misfits = []
    if missing:
        misfits.append(f"it needs {', '.join(sorted(map(str, missing)))}")
    if unknown:
        misfits.append(f"it does not take {', '.join(sorted(map(str, unknown)))}")
    if misfits:
        raise TrainingError(f"The batch does not fit {type(model).__name__}: {'; '.join(misfits)}.")


def _compare_names(model: ModelMixin, given: set[str]) -> tuple[set[str], set[str]]:
    """Return arguments that a forward needs and that are not given, and given ones that it does not take."""
    _, *parameters = inspect.signature(type(model).forward).parameters.values()
    required = {one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
    # A forward with **kwargs takes whatever it is given.
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return required - given, set()
    return required - given, given - {one.name for one in parameters}


def _replace_dropped(name: str, value: torch.Tensor, null: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Return conditioning with that of no prompt in the place of the dropped samples."""
    null = null.to(value)
    if null.shape[1:] != value.shape[1:]:
        raise TrainingError(
            f"The null prompt's {name} is {tuple(null.shape)}, one sample of the batch {tuple(value.shape[1:])}: "
            "encode both to the same length."
        )
    return torch.where(dropped.to(value.device).view(-1, *[1] * (value.ndim - 1)), null, value)


def _require_labels(model: ModelMixin, labels: Any, count: int) -> None:
    embedding = _find_label_embedding(model)
    if embedding is None:
        return
    classes = embedding.embedding_table.num_embeddings
    # Checked here, since an index out of range ends a process on CUDA.
    is_sound = (
        isinstance(labels, torch.Tensor)
        and labels.dtype in (torch.int32, torch.int64)
        and labels.shape == (count,)
        and 0 <= labels.min() <= labels.max() < classes
    )
    if not is_sound:
        raise TrainingError(
            f"The batch does not fit {type(model).__name__}: it needs class_labels, a tensor of {count} whole numbers "
            f"below {classes}."
        )


def _find_label_embedding(model: ModelMixin) -> LabelEmbedding | None:
    return next((module for module in model.modules() if isinstance(module, LabelEmbedding)), None)


def _move(value: Any, model: ModelMixin) -> Any:
    """Return a value on the model's device, numbers in floating point in its dtype."""
    if isinstance(value, Shared):
        return _move(value.value, model)
    if isinstance(value, Mapping):
        return {name: _move(item, model) for name, item in value.items()}
    if isinstance(value, list):
        return [_move(item, model) for item in value]
    if isinstance(value, tuple):
        return tuple(_move(item, model) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    # Masks, labels and positions stay whole numbers.
    if value.is_floating_point():
        return value.to(model.device, model.dtype)
    return value.to(model.device)
