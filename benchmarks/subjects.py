"""Pretrained models that recipes are compared on, each with its data, its noise and its measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
)

from diffusers_graft import testbed
from diffusers_graft.errors import FileError
from diffusers_graft.evaluation.evaluate import evaluate
from diffusers_graft.inspection import evaluating, predict
from diffusers_graft.testbed import scenes
from diffusers_graft.testbed.letters import HELD_OUT_FONTS, IMAGE_SIZE, balanced_labels, draw_letters
from diffusers_graft.testbed.sampling import SampleQuality, judge
from diffusers_graft.testbed.sampling import scheduler as flow_matching

SCENES = "testbed:scenes"
LETTERS = "testbed:letters"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How a model is measured.

    Attributes:
        held_out: samples of the denoising loss, always the same draw.
        samples, steps: of the pictures that are drawn and judged.
    """

    held_out: int = 1000
    samples: int = 400
    steps: int = 8


class Subject(Protocol):
    """A pretrained model with its data.

    Attributes:
        second: the measure beside the denoising loss.
        quality: how it is measured where nothing else is asked for.
        probe: steps of a run whose price is measured.
    """

    name: str
    second: str
    quality: Quality
    probe: int

    def load(self) -> ModelMixin: ...

    @property
    def scheduler(self) -> SchedulerMixin: ...

    def batches(self, batch_size: int, seed: int, steps: int | None = None) -> Iterator[dict[str, torch.Tensor]]: ...

    def measure(self, model: ModelMixin, quality: Quality) -> dict[str, float]: ...


@dataclass(frozen=True)
class Letters:
    """A model of letters: the shipped one, or that of a folder with its scheduler beside it."""

    name: str = LETTERS
    folder: Path | None = None
    second: str = "frechet_distance"
    quality: Quality = Quality()
    probe: int = 8

    def load(self) -> DiTTransformer2DModel:
        """Return the pretrained model, in evaluation mode."""
        if self.folder is None:
            return testbed.load()
        return DiTTransformer2DModel.from_pretrained(self.folder).eval()

    @property
    def scheduler(self) -> Any:
        """The noise that the model was trained with."""
        if self.folder is None:
            return flow_matching()
        return load_scheduler(self.folder)

    def batches(self, batch_size: int, seed: int, steps: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Return training batches, the same for the same seed."""
        return testbed.letter_batches(batch_size, seed, steps=steps)

    def measure(self, model: ModelMixin, quality: Quality) -> dict[str, float]:
        """Return the denoising loss on held-out fonts, and what samples of the model are worth."""
        labels = balanced_labels(quality.held_out)
        images = draw_letters(labels, torch.Generator().manual_seed(1), HELD_OUT_FONTS)
        pairs = zip(images.split(250), labels.split(250), strict=True)
        held_out = [{"sample": sample, "class_labels": label} for sample, label in pairs]
        judged = SampleQuality(count=quality.samples, steps=quality.steps)
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            judged = DiffusedLetters(self.scheduler, quality.samples, quality.steps)
        return evaluate(model, held_out, noise_scheduler=self.scheduler, metrics=[judged]).values


@dataclass(frozen=True)
class DiffusedLetters:
    """Frechet distance and accuracy of letters that a model of DDPM's noise draws by DDIM, for `dg.evaluate`."""

    scheduler: SchedulerMixin
    count: int
    steps: int
    seed: int = 5

    @torch.no_grad()
    def __call__(self, model: ModelMixin) -> dict[str, float]:
        labels = balanced_labels(self.count)
        image = torch.randn(self.count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(self.seed))
        ddim = DDIMScheduler.from_config(self.scheduler.config)
        ddim.set_timesteps(self.steps)
        with evaluating(model):
            for timestep in ddim.timesteps:
                inputs = {"hidden_states": image, "timestep": timestep.expand(self.count), "class_labels": labels}
                image = ddim.step(predict(model, inputs), timestep, image).prev_sample
        return judge(image.clamp(-1, 1), labels)


@dataclass(frozen=True)
class Scenes:
    """The text-to-image testbed at 128 x 128 pixels, 256 tokens."""

    name: str = SCENES
    second: str = "seen.score"
    quality: Quality = Quality(held_out=200)
    probe: int = 2  # a step is many times as long as one of the letters
    size: int = 128
    pipe: Any = field(default_factory=scenes.pipeline, repr=False)

    def load(self) -> ModelMixin:
        """Return the pretrained transformer, in evaluation mode."""
        return testbed.load_named(SCENES)

    @property
    def scheduler(self) -> SchedulerMixin:
        """The noise that the model was trained with."""
        return flow_matching()

    def batches(self, batch_size: int, seed: int, steps: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Return training batches, the same for the same seed."""
        return scenes.scene_batches(self.pipe, batch_size, seed, size=self.size, steps=steps)

    def measure(self, model: ModelMixin, quality: Quality) -> dict[str, float]:
        """Return the denoising loss on scenes of another seed, and the score of prompts that are drawn."""
        held_out = self.batches(50, 10**6, steps=max(1, quality.held_out // 50))
        score = scenes.SceneScore(count=max(1, quality.samples // 40), size=self.size, steps=quality.steps)
        values = evaluate(model, held_out, noise_scheduler=self.scheduler, metrics=[score]).values
        # Without the score of each kind of prompt, of which few are drawn.
        return {name: values[name] for name in ("denoising_loss", self.second)}


def load_subject(name: str = LETTERS) -> Subject:
    """Return a subject: `testbed:letters`, `testbed:scenes`, or the folder of another model of letters.

    Raises `FileError` for a folder without a model and its scheduler.
    """
    if name == SCENES:
        return Scenes()
    if name == LETTERS:
        return Letters()
    folder = Path(name)
    for needed in ("config.json", "scheduler/scheduler_config.json"):
        if not (folder / needed).is_file():
            raise FileError(
                f"{name} is no model of letters: {needed} is missing. Give a folder that "
                "`python -m benchmarks.testbed.pretrain` wrote, testbed:letters or testbed:scenes."
            )
    # Rows say which model it is, wherever it lies.
    config = DiTTransformer2DModel.load_config(str(folder))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    scheduler = load_scheduler(folder)
    prediction = scheduler.config.get("prediction_type", "flow matching")
    return Letters(f"letters of width {width}, {type(scheduler).__name__}, {prediction}", folder)


def load_scheduler(folder: Path) -> Any:
    """Return the scheduler beside a model."""
    config = diffusers.DDPMScheduler.load_config(str(folder / "scheduler"))
    return getattr(diffusers, config["_class_name"]).from_config(config)
