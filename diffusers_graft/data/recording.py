"""Calls of a pipeline, recorded: what its denoiser is given, and the latents that come out."""

from __future__ import annotations

import inspect
import itertools
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from torch.utils._pytree import tree_flatten, tree_leaves

from ..errors import TrainingError
from ..inspection.families import argument_names, bind_arguments
from ..training.batches import Row, Shared
from ..training.noised_batch import find_timestep_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BY_HAND = "make the batches yourself, as dicts of a sample and conditioning."

# Conditioning whose samples lie along another axis than the first: one embedding for each layer of a language model.
_SAMPLE_AXES = {"encoder_hidden_states_llama3": 1}
# Positions of tokens [N, axes] are the same for all samples, also where there are as many tokens as samples.
_POSITIONS = ("img_ids", "txt_ids")
# Names of what differs from prompt to prompt, which is never the same for all samples.
_OF_PROMPTS = ("encoder_hidden_states", "encoder_attention_mask", "pooled_", "text_embed", "prompt_embed")


class _DenoiserReachedError(BaseException):
    """Ends a call of a pipeline at its denoiser; no `Exception`, so that no pipeline handles it."""


@dataclass
class Recording:
    """Record of one call of a pipeline.

    Attributes:
        noisy: the first noised latents that the denoiser got, a tensor; None before.
        conditioning: its other arguments in that call, without timestep and defaults.
        timestep: of that call.
        changing: names of those that were another in every later step; None where there was one step.
        encoded: the prompt embeddings, where the pipeline has `encode_prompt`.
        latents: what reached the decoder, scaled as the denoiser has it.
        denoised: latents after the last step.
    """

    noisy: Any = None
    timestep: Any = None
    conditioning: dict[str, Any] = field(default_factory=dict)
    changing: set[str] | None = None
    encoded: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    denoised: torch.Tensor | None = None

    def add_step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Record the latents after a step, as the `callback_on_step_end` of a pipeline."""
        self.denoised = tensors.get("latents")
        return tensors

    def add(self, noisy: Any, timestep: Any, conditioning: dict[str, Any]) -> None:
        """Record one call of the denoiser."""
        if self.noisy is None:
            self.noisy = _stack(noisy)
            self.timestep = timestep
            self.conditioning = conditioning
            return
        # Guidance in two calls asks for the prompt first and for no prompt then, at the same timestep.
        if _is_same(timestep, self.timestep):
            return
        names = self.conditioning if self.changing is None else self.changing
        self.changing = {name for name in names if not _is_same(conditioning.get(name), self.conditioning.get(name))}


def find_denoiser(pipe: DiffusionPipeline) -> ModelMixin:
    """Return the model of a pipeline that denoises. Raises `TrainingError` where there is none."""
    for name in ("transformer", "unet"):
        denoiser = getattr(pipe, name, None)
        if isinstance(denoiser, ModelMixin):
            return denoiser
    parts = ", ".join(getattr(pipe, "components", {})) or "none"
    raise TrainingError(f"{type(pipe).__name__} has no transformer and no unet; its parts are: {parts}.")


@contextmanager
def record_call(pipe: DiffusionPipeline, *, stop: bool = False) -> Iterator[Recording]:
    """Record the first call of the pipeline inside the block.

    Args:
        stop: end the pipeline's call, and the block, when the denoiser is reached.
    """
    recording = Recording()
    denoiser = find_denoiser(pipe)
    names = argument_names(type(denoiser))
    time_name = find_timestep_name(denoiser)
    defaults = {name: one.default for name, one in inspect.signature(type(denoiser).forward).parameters.items()}

    def record_arguments(model: ModelMixin, args: tuple, kwargs: dict) -> None:
        given = bind_arguments(names, args, kwargs)
        # The noised latents come first in the forward of every denoiser of diffusers.
        noisy = given.pop(names[0])
        timestep = given.pop(time_name, None)
        given.pop("return_dict", None)
        conditioning = {name: value for name, value in given.items() if not _is_left_out(value, defaults.get(name))}
        recording.add(noisy, timestep, conditioning)
        if stop:
            raise _DenoiserReachedError

    def record_latents(args: tuple, image: Any) -> None:
        recording.latents = scale_latents(pipe.vae, args[0])

    def record_embeddings(args: tuple, embeddings: Any) -> None:
        if recording.encoded is None:
            tensors = [leaf for leaf in tree_leaves(embeddings) if isinstance(leaf, torch.Tensor)]
            recording.encoded = next(iter(tensors), None)

    handle = denoiser.register_forward_pre_hook(record_arguments, with_kwargs=True)
    try:
        with (
            _observe(getattr(pipe, "vae", None), "decode", record_latents),
            _observe(pipe, "encode_prompt", record_embeddings),
            hide_progress(pipe),
        ):
            yield recording
    except _DenoiserReachedError:
        pass  # asked for by `stop`, and everything is recorded
    finally:
        handle.remove()


def conditioning_of(recording: Recording, count: int, who: str) -> dict[str, Any]:
    """Return the conditioning of the prompts themselves, as a training set holds it.

    Tensors and lists with a row for each sample give rows [count, ...] or lists of `Row`; all else is `Shared`.

    Args:
        count: of prompts.
        who: names the pipeline in messages.

    Raises `TrainingError` for what a set cannot hold.
    """
    rows = len(recording.noisy)
    chosen = _find_prompt_rows(recording, count)
    values: dict[str, Any] = {}
    for name, value in recording.conditioning.items():
        if recording.changing and name in recording.changing:
            raise TrainingError(
                f"{who} gives its denoiser another {name} in every step, so it is not conditioning of a sample. "
                f"You can {BY_HAND}"
            )
        values[name] = _split_rows(value, rows, chosen, name, who)
    return values


def _find_prompt_rows(recording: Recording, count: int) -> slice:
    """Return which rows of a call are those of the prompts.

    With guidance in one call of more rows, those of no prompt come first in most pipelines, and last in some (Lumina,
    Z-Image). Rows of no prompt are all alike, and rows of different prompts are not.
    """
    rows = len(recording.noisy)
    first = slice(0, count)
    last = slice(rows - count, rows)
    columns = [column for column in _list_columns(recording.conditioning) if len(column) == rows]
    for column in columns:
        is_first_alike = all(_is_same(row, column[0]) for row in column[first])
        is_last_alike = all(_is_same(row, column[-1]) for row in column[last])
        if is_first_alike != is_last_alike:
            return first if is_last_alike else last
    # One prompt alone: then the first row may be what it was encoded to.
    encoded = recording.encoded
    if encoded is not None and any(
        _is_same(column[0], one.to(column[0])) for column in columns for one in (encoded, encoded[0])
    ):
        return first
    return last


def _list_columns(value: Any) -> list[Any]:
    """Return the tensors and the lists of tensors in nested conditioning."""
    if isinstance(value, torch.Tensor):
        return [value] if value.ndim else []
    if isinstance(value, Mapping):
        return list(itertools.chain.from_iterable(map(_list_columns, value.values())))
    if isinstance(value, list) and value and all(isinstance(item, torch.Tensor) for item in value):
        return [value, *value]
    return []


def _split_rows(value: Any, rows: int, chosen: slice, name: str, who: str) -> Any:
    """Return the chosen rows of a value, or the value for all samples."""
    if isinstance(value, Mapping):
        return {key: _split_rows(item, rows, chosen, str(key), who) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return _split_tensor(value, rows, chosen, name, who)
    # Objects such as caches hold state of this call, and nothing that a file could bring back.
    odd = [leaf for leaf in tree_leaves(value) if not isinstance(leaf, torch.Tensor | bool | int | float | str | None)]
    if odd:
        raise TrainingError(
            f"{who} gives its denoiser {name}={reprlib.repr(value)}, and a training set holds tensors, numbers and "
            f"texts. Call it so that it needs none of that, or {BY_HAND}"
        )
    if isinstance(value, list) and all(_has_rows(item, rows) for item in value):
        # One tensor for each layer of a text encoder.
        return [item[chosen] for item in value]
    if isinstance(value, list) and len(value) == rows:
        return [Row(item) for item in value[chosen]]
    return Shared(value)


def _split_tensor(value: torch.Tensor, rows: int, chosen: slice, name: str, who: str) -> Any:
    axis = _SAMPLE_AXES.get(name)
    if axis is not None:
        return [Row(one, axis) for one in value.split(1, dim=axis)[chosen]]
    is_positions = name in _POSITIONS and value.ndim == 2
    if value.shape[:1] == (rows,) and not is_positions:
        return value[chosen]
    if not name.startswith(_OF_PROMPTS):
        return Shared(value)
    if value.ndim < 2 or len(value) % rows:
        raise TrainingError(
            f"{who} gives its denoiser {name} of {tuple(value.shape)} for {rows} samples, which cannot be divided "
            f"among them. You can {BY_HAND}"
        )
    # AnimateDiff repeats the prompt for every frame of a sample.
    return [Row(one, 0) for one in value.split(len(value) // rows)[chosen]]


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 2 and len(value) == rows


def _is_left_out(value: Any, default: Any) -> bool:
    """Return whether the denoiser does the same without an argument."""
    # Pipelines pass empty dicts of attention arguments, which say nothing.
    if value is None or (isinstance(value, Mapping) and not value):
        return True
    return not isinstance(value, torch.Tensor | Mapping | list | tuple) and value == default


def _is_same(one: Any, other: Any) -> bool:
    leaves, structure = tree_flatten(one)
    others, other_structure = tree_flatten(other)
    if structure != other_structure:
        return False
    return all(_is_same_leaf(leaf, other_leaf) for leaf, other_leaf in zip(leaves, others, strict=True))


def _is_same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other.to(one.device))
    return one is other or one == other


def _stack(noisy: Any) -> torch.Tensor:
    """Return noised latents as one tensor, where a denoiser takes a list of them."""
    return torch.stack(list(noisy)) if isinstance(noisy, list | tuple) else noisy


@contextmanager
def _observe(owner: Any, name: str, record: Callable[[tuple, Any], None]) -> Iterator[None]:
    """Call `record` with the arguments and the result of a method, if there is such a method."""
    method = getattr(owner, name, None)
    if method is None:
        yield
        return
    attributes = vars(owner)
    before = attributes.get(name)

    def observed(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        record(args, result)
        return result

    # On the instance, so that other pipelines of the process are not observed.
    setattr(owner, name, observed)
    try:
        yield
    finally:
        # A method of the class is found again once that of the instance is gone.
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


@contextmanager
def hide_progress(pipe: DiffusionPipeline) -> Iterator[None]:
    """Hide the pipeline's progress bars inside the block: there would be one a call."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def scale_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Return latents of an autoencoder as denoisers have them, of unit scale."""
    config = vae.config
    per_channel = (-1, *[1] * (latents.ndim - 2))
    mean = torch.tensor(config.get("latents_mean") or (0.0,)).view(per_channel).to(latents)
    deviation = torch.tensor(config.get("latents_std") or (1.0,)).view(per_channel).to(latents)
    shift = config.get("shift_factor") or 0.0
    scale = config.get("scaling_factor", 1.0)
    return (latents - mean - shift) * scale / deviation
