"""Training sets that a pipeline samples itself, and prompts as its denoiser is given them."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import TrainingError
from .recording import BY_HAND, Recording, conditioning_of, hide_progress, record_call
from .shards import Shards, write_shards

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

Conditions = Sequence[str] | Sequence[int] | torch.Tensor
TextEncoder = Callable[[list[str]], Mapping[str, Any]]


@torch.no_grad()
def from_pipeline(
    pipe: DiffusionPipeline,
    conditions: Conditions,
    n: int,
    folder: str | Path,
    *,
    batch_size: int = 8,
    shard_size: int = 256,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> Shards:
    """Let a pipeline sample a training set: clean latents with the conditioning that its denoiser received.

    Args:
        pipe: with a `transformer` or a `unet`, ungrafted, and any sampler.
        conditions: prompts, or class labels; sample i has condition i, over and over.
        n: samples; a warning of the log says where they are fewer than the conditions. A longer call goes on from a
            shorter one where that ended with a full shard.
        folder: for the shards.
        arguments: of the pipeline's call: `num_inference_steps`, `guidance_scale`, `height` and the like.

    Raises:
        StateError: the folder holds a set made with other settings.
        FileError: a folder or a shard that cannot be written.
        TrainingError: no list of conditions, latents that are no clean sample of the denoiser, or conditioning that a
            set cannot hold.
    """
    if isinstance(conditions, str) or not len(conditions):
        raise TrainingError(f"Conditions are a list of prompts or of class labels; got {conditions!r}.")
    names: list[Any] = list(conditions)
    if not isinstance(names[0], str):
        names = [int(label) for label in conditions]  # numbers, not tensors, for the file
    if len(names) > n:
        logger.warning("Of %d conditions only the first %d are drawn: there are as many samples.", len(names), n)
    made = {
        "pipeline": type(pipe).__name__,
        "seed": seed,
        "batch_size": batch_size,
        "conditions": names,
        # Tensors and functions among them are compared by their texts.
        "arguments": json.loads(json.dumps(arguments, default=str)),
    }

    def make(span: range) -> Iterator[dict[str, Any]]:
        # Seeded by the shard, so that a set is the same whether or not its making was interrupted.
        generator = torch.Generator().manual_seed(seed + span.start)
        for first in range(span.start, span.stop, batch_size):
            numbers = range(first, min(first + batch_size, span.stop))
            yield sample_pipeline(pipe, [names[number % len(names)] for number in numbers], generator, arguments)

    return write_shards(Path(folder), n, shard_size, made, make, progress=progress)


def sample_pipeline(
    pipe: DiffusionPipeline, conditions: list[str] | list[int], generator: torch.Generator, arguments: Mapping
) -> dict[str, Any]:
    """Return the latents and the conditioning of one call of a pipeline.

    Raises `TrainingError` for latents that are no clean sample of the denoiser, and for conditioning that a set cannot
    hold.
    """
    if not isinstance(conditions[0], str):
        # Pipelines of class labels return images alone; the latents are those that reach the decoder.
        with record_call(pipe) as recording:
            _call(pipe, class_labels=conditions, output_type="np", generator=generator, **arguments)
        return {"sample": recording.latents, "class_labels": torch.tensor(conditions)}
    call = {"prompt": conditions, "output_type": "latent", "generator": generator, **arguments}
    with record_call(pipe) as recording:
        if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
            call.setdefault("callback_on_step_end", recording.add_step)
        result = _call(pipe, **call)
    sample = match_latents(result[0], recording, type(pipe).__name__)
    return {"sample": sample, **conditioning_of(recording, len(conditions), type(pipe).__name__)}


def match_latents(latents: Any, recording: Recording, who: str) -> torch.Tensor:
    """Return the clean latents of a call in the shape in which the denoiser takes them.

    Args:
        latents: that the pipeline returned. Those after its last step come first: some pipelines unpack or rescale
            them before they return them.

    Raises `TrainingError` where neither is a clean sample of the denoiser.
    """
    wanted = recording.noisy.shape[1:]
    for candidate in (recording.denoised, latents):
        # A denoiser of videos may take an axis of one frame that images lack.
        if isinstance(candidate, torch.Tensor) and _without_ones(candidate.shape[1:]) == _without_ones(wanted):
            return candidate.reshape(len(candidate), *wanted)
    raise TrainingError(
        f"{who} gives latents {tuple(getattr(latents, 'shape', ()))}, its denoiser takes "
        f"{tuple(recording.noisy.shape)}: they are not a clean sample of it. You can {BY_HAND}"
    )


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size > 1]


def prompt_encoder(pipe: DiffusionPipeline, **arguments: Any) -> TextEncoder:
    """Return a function from prompts to the conditioning that the denoiser of a pipeline gets for them.

    It calls the pipeline and ends the call at the denoiser, so it serves every pipeline that `from_pipeline` does.

    Args:
        arguments: of the pipeline's call, `height` and `width` among them where conditioning depends on the size.

    Raises `TrainingError` for pipelines that take no prompt; its function does for conditioning that no set can hold.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in parameters:
        raise TrainingError(
            f"{type(pipe).__name__} takes no prompt: pass text_encoder=, a function from prompts to the arguments of "
            "the model."
        )

    # Bins of resolutions fit published models only, and matter to pixels alone.
    if "use_resolution_binning" in parameters:
        arguments.setdefault("use_resolution_binning", False)

    @torch.no_grad()
    def encode_prompts(prompts: list[str]) -> dict[str, Any]:
        recording = record_prompts(pipe, prompts, arguments)
        return conditioning_of(recording, len(prompts), type(pipe).__name__)

    return encode_prompts


def record_prompts(pipe: DiffusionPipeline, prompts: list[str], arguments: Mapping[str, Any]) -> Recording:
    """Return what the denoiser of a pipeline is given for prompts; it does not run."""
    with record_call(pipe, stop=True) as recording:
        generator = torch.Generator().manual_seed(0)
        _call(pipe, prompt=prompts, output_type="latent", generator=generator, **arguments)
    return recording


@torch.no_grad()
def draw_pictures(pipe: Any, conditions: Sequence[str] | Sequence[int], *, seed: int, **arguments: Any) -> Any:
    """Return pictures [B, 3, H, W] in [-1, 1] of prompts or class labels; of a video its first frame.

    Args:
        arguments: of the pipeline's call.

    Raises `TrainingError` for conditions that the pipeline does not take.
    """
    name = require_conditions(pipe, conditions)
    generator = torch.Generator().manual_seed(seed)
    with hide_progress(pipe):
        result = pipe(**{name: list(conditions), "generator": generator, "output_type": "np", **arguments})
    values = torch.as_tensor(result[0])
    if values.ndim == 5:
        values = values[:, 0]
    return values.permute(0, 3, 1, 2) * 2 - 1


def require_conditions(pipe: DiffusionPipeline, conditions: Sequence[Any]) -> str:
    """Return the argument that takes these conditions. Raises `TrainingError` where the pipeline takes others."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    name = "prompt" if isinstance(conditions[0], str) else "class_labels"
    if name not in parameters:
        takes = ", ".join(one for one in ("prompt", "class_labels") if one in parameters) or "neither"
        raise TrainingError(
            f"{type(pipe).__name__} takes no {name}, which {conditions[0]!r} would be; it takes {takes}."
        )
    return name


def _call(pipe: Any, **arguments: Any) -> Any:
    # The class of all pipelines has no `__call__` of its kind; each of them has.
    return pipe(**arguments)
