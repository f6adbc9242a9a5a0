"""Pictures of the original and of the graft, side by side, drawn while the graft is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin

from .data.encoding import to_pixels
from .data.pipelines import draw_pictures, require_conditions
from .errors import GraftError, TrainingError
from .injection.graft import Graft
from .injection.install import disable, enable, require_graft
from .reporting.samples import save_samples
from .training.batches import own_part
from .training.callbacks import RunState
from .training.distributed import gather_values, is_main_process
from .training.previews import Preview

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

# Pictures of some conditions under a seed, with arguments of the sampler: tensors [C, H, W] in [-1, 1], or of Pillow.
Draw = Callable[..., Sequence[Any] | torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Settings of the samples that are drawn on the way.

    Attributes:
        conditions: prompts, or class labels; a picture of each.
        every: steps from one drawing to the next; the last step of a stage draws, too.
        seed: of the first picture; the others count on from it. They are the same at every drawing.
        arguments: of the pipeline's call, such as `num_inference_steps`.

    Raises `TrainingError` for no conditions, a text in place of a list, or less than one step.
    """

    conditions: Sequence[str] | Sequence[int]
    every: int = 500
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.conditions, str) or not self.conditions:
            raise TrainingError(f"Samples need a list of prompts or of class labels; got {self.conditions!r}.")
        if self.every < 1:
            raise TrainingError(f"Samples are drawn every step or less often; got every={self.every}.")


class Samples(Preview):
    """Samples of the original and of the graft, as files and in trackers.

    Files are `samples/step_000500/original_000.png`, `graft_000.png`, and `samples/samples.json`; steps of stage two
    count on from those of stage one. A drawing that fails is warned of and ends no training.

    Args:
        draw: the model's pipeline, or a function `draw(conditions, seed=..., **arguments)` that gives tensors
            [B, C, H, W] in [-1, 1], or pictures of Pillow.
        config: what to draw.
        folder: output folder of the run; without it samples go to trackers alone.

    Raises `TrainingError` for conditions that the pipeline does not take.
    """

    def __init__(self, draw: DiffusionPipeline | Draw, config: SampleConfig, folder: str | Path | None = None):
        from diffusers import DiffusionPipeline  # brings transformers and peft

        if isinstance(draw, DiffusionPipeline):
            require_conditions(draw, config.conditions)
        self.draw = draw
        self.config = config
        self.folder = folder
        self._originals: list[torch.Tensor] | None = None

    def is_due(self, state: RunState) -> bool:
        return state.global_step % self.config.every == 0 or state.global_step == state.max_steps

    def show(self, model: ModelMixin, state: RunState, trackers: Sequence[Any]) -> None:
        if self._originals is None:
            disable(model)
            try:
                self._originals = self._draw_all()
            finally:
                enable(model)
        pictures = self._draw_all()
        if is_main_process() and self._originals and pictures:
            self._write(model, state, pictures)
            pairs = zip(self._originals, pictures, strict=True)
            _log_pairs(trackers, state, [torch.cat(pair, dim=-1) for pair in pairs])

    def _draw_all(self) -> list[torch.Tensor]:
        """Return the pictures of all conditions, in order, each [3, H, W] in [-1, 1]; none where that failed."""
        numbers = list(range(len(self.config.conditions)))
        own: dict[int, torch.Tensor] = {}
        failure = None
        for number in own_part(numbers):
            # One by one: a picture is the same whoever draws it beside which others.
            try:
                own[number] = self._draw_one(self.config.conditions[number], self.config.seed + number)
            except (GraftError, RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
                failure = error
                break
        if failure is not None:
            logger.warning(
                "Samples could not be drawn, training goes on: %s (they were drawn with arguments=%s)",
                failure,
                self.config.arguments,
            )
        drawn = {number: picture for part in gather_values(own) for number, picture in part.items()}
        return [drawn[number] for number in numbers] if len(drawn) == len(numbers) else []

    def _draw_one(self, condition: Any, seed: int) -> torch.Tensor:
        from diffusers import DiffusionPipeline  # brings transformers and peft

        if isinstance(self.draw, DiffusionPipeline):
            pictures = draw_pictures(self.draw, [condition], seed=seed, **self.config.arguments)
        else:
            pictures = self.draw([condition], seed=seed, **self.config.arguments)
        # A grey picture has one channel, which stands for three.
        return to_pixels(pictures[0]).detach().float().cpu().expand(3, -1, -1)

    def _write(self, model: ModelMixin, state: RunState, pictures: list[torch.Tensor]) -> None:
        if self.folder is None:
            return
        assert self._originals is not None
        seeds = [self.config.seed + number for number in range(len(pictures))]
        try:
            save_samples(
                self.folder,
                steps_before(require_graft(model), state) + state.global_step,
                self._originals,
                pictures,
                conditions=self.config.conditions,
                seeds=seeds,
                stage=state.stage,
            )
        except GraftError as error:
            logger.warning("Samples could not be written, training goes on: %s", error)


def steps_before(graft: Graft, state: RunState) -> int:
    """Return the steps of stage one, which those of stage two count on from."""
    if state.stage == "one":
        return 0
    return sum(row["steps"] for row in graft.history if row["stage"] == "one")


def _log_pairs(trackers: Sequence[Any], state: RunState, pairs: list[torch.Tensor]) -> None:
    """Log pictures of the original beside the graft's."""
    arrays = [((pair.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for pair in pairs]
    name = f"{state.stage}/samples"
    for tracker in trackers:
        if tracker.name == "tensorboard":
            stacked = torch.stack([torch.from_numpy(array) for array in arrays]).numpy()
            tracker.log_images({name: stacked}, step=state.global_step, dataformats="NHWC")
        elif tracker.name == "trackio":
            from trackio import Image

            tracker.log({f"{name}/{number}": Image(array) for number, array in enumerate(arrays)})
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: arrays}, step=state.global_step)
