"""Samples drawn into a folder: shared out over processes, and continued where a run was interrupted.

The noise of a sample depends on the seed and on its place alone, not on batches or on the number of processes.
Batches are always cut at the same places, so that a run that was interrupted ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from ..core.progress import hide_bar
from ..core.storage import read_json, write_json, write_text
from ..errors import FileError, GraftError, ModelError
from ..training.distributed import is_main_process, process_state, wait_for_all
from ..training.identity import digest, find_differences
from .conditions import text_of
from .pictures import as_pixels, import_pillow, read_picture, write_picture

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

RECORD = "samples.json"
_SECONDS_BETWEEN_LINES = 60

Draw = Callable[[Any, Sequence[Any], Sequence[torch.Generator], "Sampling"], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are drawn; all of it is part of the protocol, but for `batch_size`.

    Attributes:
        steps, guidance, height, width: as the pipeline takes them; None leaves its defaults.
        guided_channels: channels of the latents that guidance acts on, from the first; DiT's own code guides 3 of 4,
            diffusers' pipeline all of them. Only `DiTPipeline` can be asked for this.
        samples_per_condition: pictures of every prompt or label; GenEval draws 4.
        batch_size: samples that are drawn at once, on each process.
        arguments: further arguments of the pipeline by name.
        draw: takes the model or pipeline, conditions, a generator for each, and this value; returns images
            [B, C, H, W] in [0, 1]. By default the pipeline is called.
    """

    steps: int | None = None
    guidance: float | None = None
    guided_channels: int | None = None
    height: int | None = None
    width: int | None = None
    samples_per_condition: int = 1
    batch_size: int = 16
    arguments: dict[str, Any] = field(default_factory=dict)
    draw: Draw | None = None

    def __post_init__(self):
        counts = {name: getattr(self, name) for name in ("samples_per_condition", "batch_size")}
        optional = {name: getattr(self, name) for name in ("steps", "guided_channels", "height", "width")}
        counts |= {name: value for name, value in optional.items() if value is not None}
        for name, value in counts.items():
            if type(value) is not int or value < 1:
                raise GraftError(f"Sampling counts {name} from 1; got {value!r}.")


def model_of(pipeline: Any) -> nn.Module:
    """Return the denoising model of a pipeline, or a model itself. Raises `ModelError` where there is none."""
    if isinstance(pipeline, nn.Module):
        return pipeline
    model = getattr(pipeline, "transformer", None)
    if model is None:
        model = getattr(pipeline, "unet", None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"Samples are drawn by a pipeline with a transformer or a UNet; got {type(pipeline).__name__}."
        )
    return model


def describe_sampling(pipeline: Any, sampling: Sampling) -> dict[str, Any]:
    """Return what decides how samples look, beside weights and conditions, by name; defaults by their values."""
    protocol: dict[str, Any] = {"pipeline": type(pipeline).__name__}
    settings = {"steps": sampling.steps, "guidance": sampling.guidance}
    sizes = {"height": sampling.height, "width": sampling.width}
    if sampling.draw is None:
        defaults = inspect.signature(type(pipeline).__call__).parameters
        for name, argument in (("steps", "num_inference_steps"), ("guidance", "guidance_scale")):
            if settings[name] is None and argument in defaults:
                settings[name] = defaults[argument].default
    else:
        protocol["draw"] = getattr(sampling.draw, "__qualname__", type(sampling.draw).__name__)
    protocol |= settings
    protocol["guided_channels"] = sampling.guided_channels or "all"
    protocol |= {name: value for name, value in {**sizes, **sampling.arguments}.items() if value is not None}
    scheduler = getattr(pipeline, "scheduler", None)
    # Of a scheduler the settings count too: its steps may be spaced, or its noise scaled, in another way.
    if scheduler is not None:
        protocol["scheduler"] = f"{type(scheduler).__name__} {digest(_settings_of(scheduler))}"
    autoencoder = getattr(pipeline, "vae", None)
    if isinstance(autoencoder, nn.Module):
        # By its weights: a name may stand for several, and a path is nobody else's.
        protocol["autoencoder"] = f"{type(autoencoder).__name__} {digest(autoencoder.state_dict())}"
    return protocol


def _settings_of(scheduler: Any) -> dict[str, str]:
    return {name: str(value) for name, value in scheduler.config.items() if not name.startswith("_")}


@dataclass(frozen=True)
class SampleFolder:
    """Pictures of one run of sampling, one PNG a sample.

    Attributes:
        conditions: what each sample was drawn for.
        per_condition: samples of one condition, which stand one after another.
    """

    path: Path
    conditions: Sequence[Any]
    per_condition: int = 1

    def __len__(self) -> int:
        return len(self.conditions)

    @property
    def is_geneval(self) -> bool:
        """Whether pictures lie as GenEval's own scorer reads them, `00000/samples/0000.png`."""
        return bool(self.conditions) and isinstance(self.conditions[0], dict) and "include" in self.conditions[0]

    def file_of(self, index: int) -> Path:
        """Return the file of a sample."""
        if not self.is_geneval:
            return self.path / f"{index:06d}.png"
        prompt, number = divmod(index, self.per_condition)
        return self.path / f"{prompt:05d}" / "samples" / f"{number:04d}.png"

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Read pictures, [B, C, H, W] in [0, 1]. Raises `FileError` for one that is missing or damaged."""
        pictures = [read_picture(self.file_of(index)) for index in indices]
        if len({picture.shape for picture in pictures}) > 1:
            raise FileError(f"{self.path} holds pictures of different sizes. Draw into an empty folder.")
        return torch.stack(pictures)

    def batches(self, batch_size: int) -> Iterator[Sequence[int]]:
        """Yield the samples of every batch; a batch is drawn and read by one process."""
        for start in range(0, len(self), batch_size):
            yield range(start, min(start + batch_size, len(self)))


def open_folder(path: Path, conditions: Sequence[Any], per_condition: int, record: dict[str, Any]) -> SampleFolder:
    """Open a folder for samples, new or interrupted.

    Args:
        conditions: one for each prompt or label.
        record: everything that decides the pictures.

    Raises `FileError` for a folder with samples of something else.
    """
    folder = SampleFolder(path, [one for one in conditions for _ in range(per_condition)], per_condition)
    # As it will be read again, so that both can be compared.
    written = json.loads(json.dumps({**record, "conditions": list(conditions)}, default=str))
    # One process makes the folder; the others see it complete.
    if is_main_process():
        _record(folder, written, conditions)
    wait_for_all()
    return folder


def _record(folder: SampleFolder, record: dict[str, Any], conditions: Sequence[Any]) -> None:
    path = folder.path
    if (path / RECORD).exists():
        differences = list(find_differences(read_json(path / RECORD), record).values())
        if differences:
            words = "; ".join(differences[:3])
            raise FileError(f"{path} holds other samples: {words}. Give another folder, or move that one away.")
        return
    if path.exists() and any(path.iterdir()):
        raise FileError(f"{path} holds files, and no {RECORD} of ours. Give another folder, or an empty one.")
    path.mkdir(parents=True, exist_ok=True)
    if folder.is_geneval:
        for number, condition in enumerate(conditions):
            (path / f"{number:05d}").mkdir(exist_ok=True)
            write_text(path / f"{number:05d}" / "metadata.jsonl", json.dumps(condition))
    # Last, so that a folder with it is whole.
    write_json(path / RECORD, record)


@torch.no_grad()
def draw_samples(
    pipeline: Any,
    folder: SampleFolder,
    sampling: Sampling,
    *,
    seed: int,
    progress: bool = True,
    check: Callable[[torch.Tensor, Sequence[Any]], None] | None = None,
) -> None:
    """Draw the samples that a folder lacks; every process draws its share of the batches.

    Args:
        check: called with the first pictures that this process draws and their conditions; raises to stop the run.

    Raises `GraftError` for pictures that are not finite, not in [0, 1], or of several sizes.
    """
    draw = sampling.draw or draw_with_pipeline
    state = process_state()
    missing = []
    for number, batch in enumerate(folder.batches(sampling.batch_size)):
        # Batches keep their places in a run that is continued, also by another number of processes.
        is_ours = number % state.num_processes == state.process_index
        if is_ours and not all(folder.file_of(index).exists() for index in batch):
            missing.append(batch)
    total = sum(len(batch) for batch in missing)
    is_shown = progress and state.is_main_process and total > 0
    bar = tqdm(total=total, desc="sampling", unit="sample", leave=False, disable=hide_bar(is_shown))
    logged = time.monotonic()
    drawn = 0
    size = _size_in(folder)
    with bar:
        for batch in missing:
            conditions = [folder.conditions[index] for index in batch]
            generators = [make_generator(seed, index) for index in batch]
            images = draw(pipeline, conditions, generators, sampling)
            _require_images(images, len(batch))
            if size is not None and images.shape[1:] != size:
                raise GraftError(
                    f"All samples have one size, [C, H, W]; got {tuple(images.shape[1:])} after {tuple(size)}."
                )
            size = images.shape[1:]
            pixels = as_pixels(images)
            if check is not None:
                check(pixels.permute(0, 3, 1, 2) / 255, conditions)
                check = None
            for index, picture in zip(batch, pixels, strict=True):
                # What an interrupted run has written stays.
                if not folder.file_of(index).exists():
                    write_picture(folder.file_of(index), picture)
            bar.update(len(batch))
            # A bar that is not shown does not count.
            drawn += len(batch)
            if time.monotonic() > logged + _SECONDS_BETWEEN_LINES:
                logger.info("%d of %d samples of this process are drawn.", drawn, total)
                logged = time.monotonic()
    wait_for_all()


def _size_in(folder: SampleFolder) -> torch.Size | None:
    """Return the size of the pictures that an interrupted run has left, None without any."""
    present = next((index for index in range(len(folder)) if folder.file_of(index).exists()), None)
    if present is None:
        return None
    return folder.read([present]).shape[1:]


def make_generator(seed: int, index: int) -> torch.Generator:
    """Return the source of a sample's noise, on the CPU; it depends on the seed and the sample's place."""
    # Hashed, since seeds that are near each other give generators some of whose numbers are alike.
    text = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(text[:7], "big"))


def _require_images(images: Any, count: int) -> None:
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or len(images) != count:
        shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise GraftError(f"{count} samples are images [B, C, H, W]; got {shape}.")
    if images.shape[1] not in (1, 3):
        raise GraftError(f"Images have 1 channel or 3; got {images.shape[1]}.")
    if not images.isfinite().all():
        raise GraftError("The samples are not finite. Look at the weights, and at the dtype: float16 overflows.")
    if images.min() < 0 or images.max() > 1:
        raise GraftError(
            f"Images lie in [0, 1]; these go from {images.min().item():.3g} to {images.max().item():.3g}. Scale them "
            "in the function that draws."
        )


def check_conditions(pipeline: Any, conditions: Sequence[Any], sampling: Sampling) -> None:
    """Raise where a pipeline cannot draw for these conditions, before it tries.

    Raises `GraftError` for none, for prompts of a pipeline of classes and labels of one of prompts, and for labels
    that there are not; `ModelError` for a pipeline that draws no images.
    """
    if not conditions:
        raise GraftError("There is nothing to draw: give prompts or class labels.")
    import_pillow()
    if sampling.draw is not None:
        return
    from diffusers import DiffusionPipeline  # brings transformers and peft

    arguments = inspect.signature(type(pipeline).__call__).parameters
    takes_labels = "class_labels" in arguments
    if not isinstance(pipeline, DiffusionPipeline) or not (takes_labels or "prompt" in arguments):
        raise ModelError(
            f"{type(pipeline).__name__} takes neither prompts nor class labels. Say how it draws: Sampling(draw=...); "
            "to measure on batches, pass its transformer, pipe.transformer."
        )
    for condition in conditions:
        is_text = text_of(condition) is not None
        if is_text == takes_labels:
            kind = "class labels" if takes_labels else "prompts"
            raise GraftError(f"{type(pipeline).__name__} draws for {kind}; got {condition!r}.")
    if takes_labels:
        classes = model_of(pipeline).config.get("num_embeds_ada_norm") or 0  # pyright: ignore
        wrong = [label for label in conditions if not 0 <= int(label) < classes]
        if wrong:
            raise GraftError(f"There are {classes} classes, from 0; got the label {int(wrong[0])}.")
    if sampling.guided_channels is not None and not takes_labels:
        raise GraftError(f"guided_channels is for DiTPipeline; {type(pipeline).__name__} guides all channels.")


def draw_with_pipeline(
    pipeline: DiffusionPipeline, conditions: Sequence[Any], generators: Sequence[torch.Generator], sampling: Sampling
) -> torch.Tensor:
    """Draw images [B, C, H, W] in [0, 1] by calling a pipeline."""
    call = cast(Any, pipeline)
    texts = [text_of(condition) for condition in conditions]
    arguments: dict[str, Any] = dict(sampling.arguments)
    if None in texts:
        arguments["class_labels"] = [int(condition) for condition in conditions]
    else:
        arguments["prompt"] = texts
    named = {
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "height": sampling.height,
        "width": sampling.width,
    }
    arguments |= {name: value for name, value in named.items() if value is not None}
    # One bar for all samples says more than one for the steps of each batch.
    bar_settings = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(disable=True)
    try:
        with _seeded_steps(call.scheduler, generators), _guided(call, sampling):
            # As tensors, since pictures would have been rounded already.
            return call(generator=list(generators), output_type="pt", **arguments).images.float()
    finally:
        pipeline.set_progress_bar_config(**(bar_settings or {}))


@contextlib.contextmanager
def _seeded_steps(scheduler: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Draw the noise of every step from the samples' generators, also where the pipeline leaves that to chance."""
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters:
        yield
        return

    @functools.wraps(step)
    def seeded_step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is None and len(args) < 3:
            # With guidance a batch holds every sample twice.
            kwargs["generator"] = list(generators) * (len(model_output) // len(generators))
        return step(model_output, *args, **kwargs)

    scheduler.step = seeded_step
    try:
        yield
    finally:
        del scheduler.step


@contextlib.contextmanager
def _guided(pipeline: Any, sampling: Sampling) -> Iterator[None]:
    """Guide the first channels alone: of the others both halves of the batch have what was predicted for the label."""
    channels = sampling.guided_channels
    is_guided = sampling.guidance is None or sampling.guidance > 1
    if channels is None or not is_guided:
        yield
        return
    latents = pipeline.transformer.config.in_channels

    def leave_unguided(module: nn.Module, args: tuple, output: Any) -> Any:
        conditional, unconditional = output.sample.chunk(2)
        unconditional = unconditional.clone()
        unconditional[:, channels:latents] = conditional[:, channels:latents]
        return type(output)(sample=torch.cat([conditional, unconditional]))

    # A hook, since the pipeline mixes both halves between this call and the step.
    handle = pipeline.transformer.register_forward_hook(leave_unguided)
    try:
        yield
    finally:
        handle.remove()
