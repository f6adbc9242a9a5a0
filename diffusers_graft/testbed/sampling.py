"""Samples of the letters model, and their quality."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, ModelMixin
from tqdm.auto import tqdm

from ..core.progress import hide_bar
from ..errors import GraftError
from ..evaluation.evaluate import evaluate
from ..evaluation.metrics.frechet_distance import FeatureStatistics, frechet_distance
from ..evaluation.plots import new_figure
from ..evaluation.sampling import Sampling
from ..evaluation.scores import Scores
from ..inspection import evaluating, predict
from .classifier import load_classifier
from .letters import HELD_OUT_FONTS, IMAGE_SIZE, LETTERS, balanced_labels, draw_letters

REFERENCE_IMAGES = 10_000


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the noise scheduler that the testbed was trained with."""
    return FlowMatchEulerDiscreteScheduler()


@torch.no_grad()
def sample(
    model: ModelMixin,
    labels: torch.Tensor,
    *,
    seed: int,
    steps: int = 20,
    guidance: float = 1.0,
    batch_size: int = 250,
    progress: bool = True,
) -> torch.Tensor:
    """Draw one image for each label, by Euler steps from noise that depends on `seed` alone.

    Args:
        labels: class indices, [B].
        guidance: classifier-free guidance; 1 is none, and half the price.

    Returns:
        Images [B, 1, 16, 16] in [-1, 1].
    """
    # drawn at once, so that images do not depend on the size of batches
    noise = torch.randn(len(labels), 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    images = []
    bar = tqdm(total=len(labels), desc="sampling", unit="image", leave=False, disable=hide_bar(progress))
    with evaluating(model), bar:
        for image, label in zip(noise.split(batch_size), labels.split(batch_size), strict=True):
            images.append(_denoise(model, image, label, steps, guidance))
            bar.update(len(image))
    return torch.cat(images)


def draw(
    model: ModelMixin, labels: Sequence[int], generators: Sequence[torch.Generator], sampling: Sampling
) -> torch.Tensor:
    """Draw letters for `dg.Sampling(draw=...)`: images [B, 1, 16, 16] in [0, 1].

    Steps are 20 unless the sampling says otherwise, and there is no guidance.
    """
    noise = [torch.randn(1, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for generator in generators]
    guidance = 1.0 if sampling.guidance is None else sampling.guidance
    images = _denoise(model, torch.stack(noise), torch.tensor(labels), sampling.steps or 20, guidance)
    return images / 2 + 0.5


def _denoise(model: ModelMixin, image: torch.Tensor, label: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """Return the images in [-1, 1] that noise becomes by Euler steps."""
    euler = scheduler()
    euler.set_timesteps(steps)
    levels = euler.sigmas
    assert isinstance(levels, torch.Tensor)
    image = image.to(model.device, model.dtype)
    label = label.to(model.device)
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        velocity = _velocity(model, image, level, label, guidance)
        image = image + (following - level) * velocity
    return image.float().cpu().clamp(-1, 1)


def _velocity(
    model: ModelMixin, image: torch.Tensor, level: torch.Tensor, label: torch.Tensor, guidance: float
) -> torch.Tensor:
    """Return the model's prediction at a noise level, with classifier-free guidance unless that is 1."""
    timestep = (1000 * level).expand(len(image)).to(image)
    if guidance == 1.0:
        return predict(model, {"hidden_states": image, "timestep": timestep, "class_labels": label})
    # the last class is that of no label
    labels = torch.cat([label, torch.full_like(label, len(LETTERS))])
    inputs = {"hidden_states": image.repeat(2, 1, 1, 1), "timestep": timestep.repeat(2), "class_labels": labels}
    conditional, unconditional = predict(model, inputs).chunk(2)
    return torch.lerp(unconditional, conditional, guidance)


@functools.cache
@torch.no_grad()
def reference() -> FeatureStatistics:
    """Return feature statistics of 10,000 class-balanced images in the training fonts."""
    images = draw_letters(balanced_labels(REFERENCE_IMAGES), torch.Generator().manual_seed(3))
    return FeatureStatistics.of(load_classifier().features(images))


@dataclass(frozen=True, kw_only=True)
class SampleQuality:
    """Metric for `dg.evaluate`: Frechet distance to the data and accuracy of class-balanced samples.

    Distances of different `count` are not comparable: the fewer samples, the larger the distance.

    Raises `GraftError` for fewer than two samples, or no step.
    """

    count: int = 1000
    steps: int = 20
    guidance: float = 1.0
    seed: int = 5

    def __post_init__(self):
        if self.count < 2 or self.steps < 1:
            raise GraftError(f"Samples are judged from 2 images and drawn in 1 step or more; got {self}.")

    def __call__(self, model: ModelMixin) -> dict[str, float]:
        labels = balanced_labels(self.count)
        images = sample(model, labels, seed=self.seed, steps=self.steps, guidance=self.guidance)
        return judge(images, labels)


def measure(model: DiTTransformer2DModel, *metrics: SampleQuality, count: int = 1000) -> Scores:
    """Return the denoising loss on `count` letters of held-out fonts, always the same, and the metrics' values."""
    labels = balanced_labels(count)
    images = draw_letters(labels, torch.Generator().manual_seed(1), HELD_OUT_FONTS)
    pairs = zip(images.split(250), labels.split(250), strict=True)
    held_out = [{"sample": sample, "class_labels": label} for sample, label in pairs]
    return evaluate(model, held_out, noise_scheduler=scheduler(), metrics=metrics)


@torch.no_grad()
def judge(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return Frechet distance and accuracy of images [B, 1, 16, 16] that should show the labels."""
    features = load_classifier().features(images)
    right = load_classifier().head(features).argmax(1) == labels
    return {
        "frechet_distance": frechet_distance(FeatureStatistics.of(features), reference()),
        "accuracy": right.float().mean().item(),
    }


def real_baseline(count: int = 1000, seeds: int = 5) -> tuple[float, float]:
    """Return the Frechet distance of real images to the data, mean and standard deviation over draws.

    Samples can hardly be nearer.
    """
    labels = balanced_labels(count)
    distances = []
    for seed in range(seeds):
        images = draw_letters(labels, torch.Generator().manual_seed(100 + seed))
        distances.append(judge(images, labels)["frechet_distance"])
    distances = torch.tensor(distances)
    return distances.mean().item(), distances.std().item()


def save_sample_grid(path: Path, panels: Mapping[str, torch.Tensor], *, columns: int = 10) -> None:
    """Draw panels side by side, dark letters on light paper.

    Args:
        panels: images [B, 1, 16, 16] in [-1, 1] by title.
    """
    first = next(iter(panels.values()))
    rows = math.ceil(len(first) / columns)
    figure = new_figure("Drawing samples", 0.42 * columns * len(panels) + 0.8, 0.42 * rows + 0.45)
    figure.set_layout_engine("constrained", wspace=0.08)  # a gap between letters of neighbouring panels
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, images) in zip(axes, panels.items(), strict=True):
        axis.imshow(_tiled(images, columns), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=150)


def _tiled(images: torch.Tensor, columns: int) -> torch.Tensor:
    """Return [B, 1, S, S] as one picture with `columns` images in a row, paper in empty places."""
    missing = -len(images) % columns
    images = torch.cat([images[:, 0], -torch.ones(missing, *images.shape[2:])])
    size = images.shape[-1]
    return images.view(-1, columns, size, size).permute(0, 2, 1, 3).reshape(-1, columns * size)
