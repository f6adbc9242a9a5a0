"""The model of a recipe with what surrounds it: pipeline, noise scheduler, data of its own, and a way to draw."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin, PixArtSigmaPipeline, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from torch import nn

from .. import testbed
from ..core.storage import read_json
from ..data import SampleEncoder, prompt_encoder
from ..data.recording import find_denoiser
from ..errors import FileError, GraftError, TrainingError
from ..serialization.download import local_folder
from ..testbed import sampling as letters
from ..training.batches import Batch
from ..training.distributed import process_state
from ..training.fsdp import fsdp_plugin
from .schema import ModelSettings

_INDEX = "model_index.json"
# Enough to know a model's shapes, and none of its weights.
CONFIGS = [_INDEX, "config.json", "*/config.json", f"*/{SCHEDULER_CONFIG_NAME}"]


@dataclass
class Source:
    """A model and what surrounds it.

    Attributes:
        model: the transformer.
        noise_scheduler: that training adds noise with; None where none is known.
        pipeline: of the model; None of a transformer alone.
        null_prompt: conditioning of no prompt, from arguments of the pipeline's call.
        batches: endless data of a testbed, from a batch size and a seed.
        held_out: data of a testbed that is evaluated on, from a number of samples and a batch size.
        draw: the pipeline, or pictures [B, C, H, W] in [-1, 1] for conditions under a seed, with arguments of the
            sampler; None of a transformer alone.
    """

    model: ModelMixin
    noise_scheduler: SchedulerMixin | None = None
    pipeline: DiffusionPipeline | None = None
    null_prompt: Callable[..., Mapping[str, torch.Tensor] | None] = lambda **arguments: None
    batches: Callable[[int, int], Iterator[Batch]] | None = None
    held_out: Callable[[int, int], list[Batch]] | None = None
    draw: DiffusionPipeline | Callable[..., torch.Tensor] | None = None

    def encoder(self, size: int | tuple[int, int], **columns: str | None) -> SampleEncoder:
        """Return the encoder of pictures and captions. Raises `TrainingError` for a transformer without pipeline."""
        if self.pipeline is None:
            raise TrainingError(
                "Pictures are encoded by the model's pipeline, and this is a transformer alone: name its pipeline as "
                "the model, or give data.latents."
            )
        return SampleEncoder(self.pipeline, size=size, **columns)


def load_source(settings: ModelSettings) -> Source:
    """Load the model of a recipe.

    Raises `FileError` where there is none, or the Hub cannot be reached, and `GraftError` for a dtype that the device
    lacks.
    """
    require_dtype(settings)
    # Testbeds come with the library, so nothing is asked of the Hub.
    if settings.name.startswith("testbed:"):
        return _load_testbed(settings.name)
    folder = find_configs(settings)
    arguments = {"torch_dtype": getattr(torch, settings.dtype or "float32")}
    if settings.revision is not None:
        arguments["revision"] = settings.revision
    if settings.subfolder is None and (folder / _INDEX).exists():
        pipeline = _load(DiffusionPipeline, settings, arguments)
        model = find_denoiser(pipeline)
        _move_to_device(pipeline, model)
        source = Source(
            model.eval(),
            pipeline.scheduler,
            pipeline,
            null_prompt=functools.partial(_encode_no_prompt, pipeline),
            draw=pipeline,
        )
    else:
        model = _load(AutoModel, settings, {**arguments, "subfolder": settings.subfolder})
        source = Source(model.eval())
    if settings.scheduler is not None:
        source.noise_scheduler = _load_scheduler(settings.scheduler)
    return source


def _move_to_device(pipeline: DiffusionPipeline, model: ModelMixin) -> None:
    """Move a pipeline to the device of this process, all but a model whose weights are to be sharded."""
    # accelerate sets it as it starts
    device = cast(torch.device, process_state().device)
    if fsdp_plugin() is None:
        pipeline.to(device)
        return
    # Its encoders alone, which encode pictures and prompts during training.
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and part is not model:
            part.to(device)


def load_model(name: str, *, subfolder: str | None = None, revision: str | None = None) -> ModelMixin:
    """Load a transformer by the name of a testbed, a folder or a repository, of it or of its pipeline.

    Raises `FileError` where there is none.
    """
    settings = ModelSettings(name=name, subfolder=subfolder, revision=revision)
    if name.startswith("testbed:"):
        return testbed.load_named(name)
    if subfolder is None and (find_configs(settings) / _INDEX).exists():
        # Of a pipeline the transformer alone, since its text encoders are large.
        settings = ModelSettings(name=name, subfolder="transformer", revision=revision)
    return _load(AutoModel, settings, {"subfolder": settings.subfolder, "revision": revision})


def find_configs(settings: ModelSettings) -> Path:
    """Return a folder with the configurations of a model, downloaded where it is a repository.

    Raises `FileError` where there is no such folder or repository, or the Hub cannot be reached.
    """
    hub_arguments = {} if settings.revision is None else {"revision": settings.revision}
    # One request, and no retries: without a network the answer comes at once.
    try:
        return local_folder(settings.name, CONFIGS, **hub_arguments)
    except FileError as error:
        raise FileError(f"There is no model of diffusers in {settings.name}: {error}") from error


def require_dtype(settings: ModelSettings) -> None:
    """Raise `GraftError` for a dtype that the device of this process lacks."""
    # accelerate sets it as it starts
    device = cast(torch.device, process_state().device)
    if settings.dtype == "float16" and device.type == "cpu":
        raise GraftError("model.dtype: a CPU does not train in float16. Set bfloat16 or float32.")
    if settings.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise GraftError(f"model.dtype: {torch.cuda.get_device_name(device)} has no bfloat16. Set float16 or float32.")


def _load(cls: Any, settings: ModelSettings, arguments: dict[str, Any]) -> Any:
    try:
        return cls.from_pretrained(settings.name, **arguments)
    # diffusers fails in many ways over files of another kind
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise FileError(
            f"There is no model of diffusers in {settings.name}: {reason} Give a folder that save_pretrained wrote, "
            "or a Hub repository user/name; of a transformer within, its subfolder, such as transformer."
        ) from error


def _load_scheduler(name: str) -> SchedulerMixin:
    """Load a noise scheduler by the class that its configuration names."""
    import diffusers

    folder = local_folder(name, [SCHEDULER_CONFIG_NAME, f"*/{SCHEDULER_CONFIG_NAME}"])
    if not (folder / SCHEDULER_CONFIG_NAME).exists():
        folder = folder / "scheduler"
    config = read_json(folder / SCHEDULER_CONFIG_NAME)
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise FileError(f"{folder} names no noise scheduler of diffusers: {config.get('_class_name')!r}.")
    return cast(Any, cls).from_config(config)


def _load_testbed(name: str) -> Source:
    if name != "testbed:scenes":
        model = testbed.load_named(name)
        return Source(
            model,
            letters.scheduler(),
            batches=testbed.letter_batches,
            held_out=_held_out_letters,
            draw=functools.partial(_draw_letters, model),
        )
    pipeline = testbed.scenes.pipeline()
    return Source(
        pipeline.transformer,
        pipeline.scheduler,
        pipeline,
        null_prompt=lambda **arguments: testbed.scenes.null_prompt(pipeline),
        batches=functools.partial(testbed.scenes.scene_batches, pipeline),
        held_out=functools.partial(_held_out_scenes, pipeline),
        draw=functools.partial(_draw_scenes, pipeline),
    )


def _held_out_letters(samples: int, batch_size: int) -> list[Batch]:
    labels = testbed.balanced_labels(samples)
    images = testbed.draw_letters(labels, torch.Generator().manual_seed(1), testbed.HELD_OUT_FONTS)
    pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return [{"sample": image, "class_labels": label} for image, label in pairs]


def _held_out_scenes(pipeline: PixArtSigmaPipeline, samples: int, batch_size: int) -> list[Batch]:
    size = min(samples, batch_size)
    # Another seed than any that scenes are trained on.
    return list(testbed.scenes.scene_batches(pipeline, size, seed=10**6, steps=samples // size))


def _draw_letters(model: ModelMixin, labels: Sequence[int], seed: int, **arguments: Any) -> torch.Tensor:
    return letters.sample(model, torch.tensor(labels), seed=seed, progress=False, **arguments)


def _draw_scenes(pipeline: PixArtSigmaPipeline, prompts: list[str], seed: int, **arguments: Any) -> torch.Tensor:
    return testbed.scenes.draw_prompts(pipeline, prompts, seed=seed, progress=False, **arguments)


def _encode_no_prompt(pipeline: Any, **arguments: Any) -> dict[str, torch.Tensor] | None:
    """Return the conditioning of no prompt, None for pipelines without guidance, which never ask for it."""
    if "negative_prompt" not in inspect.signature(type(pipeline).__call__).parameters:
        return None
    encoded = prompt_encoder(pipeline, **arguments)([""])
    if not all(isinstance(value, torch.Tensor) for value in encoded.values()):
        return None
    return dict(encoded)
