"""The score of a text-to-image model on scenes, by GenEval's rules (arXiv 2310.11513)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ImagePipelineOutput, PixArtSigmaPipeline, PixArtTransformer2DModel
from tqdm.auto import tqdm

from ...core.progress import hide_bar
from ...errors import GraftError, UnknownNameError
from ...evaluation.geneval.rules import relations
from .detect import Found, detect
from .grammar import PROMPT_KINDS
from .pipeline import check_scheduler, pipeline, require_text_encoder, warn_of_unknown_words

PROMPTS = Path(__file__).parent / "prompts"
PROMPT_SETS = ("seen", "held_out")


def load_prompts(name: str = "seen") -> list[dict[str, Any]]:
    """Load the fixed prompts, `seen` (600) or `held_out` (300), each with GenEval's metadata.

    Raises `UnknownNameError` for another name.
    """
    if name not in PROMPT_SETS:
        raise UnknownNameError("set of prompts", name, PROMPT_SETS)
    return [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def is_right(metadata: dict[str, Any], found: Sequence[Found]) -> bool:
    """Return whether a picture shows what its prompt asks for: objects, counts, colours and positions."""
    matched: list[list[Found]] = []
    for entry in metadata["include"]:
        candidates = [one for one in found if one.kind == entry["class"]]
        if "color" in entry:
            candidates = [one for one in candidates if one.colour == entry["color"]]
        if len(candidates) < entry["count"]:
            return False
        if "position" in entry:
            relation, index = entry["position"]
            if not any(relation in relations(one.box, other.box) for one in candidates for other in matched[index]):
                return False
        matched.append(candidates)
    for unwanted in metadata.get("exclude", ()):
        if sum(one.kind == unwanted["class"] for one in found) >= unwanted["count"]:
            return False
    return True


@torch.no_grad()
def draw_prompts(
    pipe: PixArtSigmaPipeline,
    prompts: Sequence[str],
    *,
    size: int | tuple[int, int] = 256,
    steps: int = 16,
    guidance: float = 3.0,
    seed: int = 5,
    batch_size: int = 16,
    progress: bool = True,
) -> torch.Tensor:
    """Draw one picture for each prompt; the noise of each depends on `seed` and its place alone.

    Args:
        size: pixels of a square, or height and width.

    Returns:
        Pictures [B, 3, H, W] in [-1, 1].

    Raises `GraftError` for a size that is no multiple of 8, no prompts or steps, or a pipeline that cannot draw them.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height % 8 or width % 8 or min(height, width) < 8:
        raise GraftError(f"The sides of a picture are multiples of 8 pixels; got {size}.")
    if isinstance(prompts, str):
        raise GraftError(f"Prompts are a list; got the text {prompts!r}. Put it into a list of one.")
    if not prompts:
        raise GraftError("There are no prompts to draw.")
    if steps < 1:
        raise GraftError(f"Pictures take 1 step or more; got {steps}.")
    require_text_encoder(pipe)
    check_scheduler(pipe)
    # A pipeline of `pipeline()` warns by itself.
    if "encode_prompt" not in vars(pipe):
        warn_of_unknown_words(pipe, list(prompts))
    channels = pipe.transformer.config.in_channels
    pictures = []
    bar = tqdm(total=len(prompts), desc="drawing", unit="picture", leave=False, disable=hide_bar(progress))
    pipe.set_progress_bar_config(disable=True)
    with bar:
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            noise = [
                torch.randn(
                    channels, height // 8, width // 8, generator=torch.Generator().manual_seed(seed * 100_000 + index)
                )
                for index in range(start, start + len(batch))
            ]
            drawn = pipe(
                batch,
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                latents=torch.stack(noise).to(pipe.device, pipe.transformer.dtype),
                use_resolution_binning=False,
                clean_caption=False,
                max_sequence_length=32,
                output_type="pt",
            )
            assert isinstance(drawn, ImagePipelineOutput)
            # as output_type="pt" asks for, which the annotation of pipelines does not know
            images = cast(torch.Tensor, drawn.images)
            pictures.append(images.float().cpu() * 2 - 1)
            bar.update(len(batch))
    return torch.cat(pictures)


@dataclass(frozen=True, kw_only=True)
class SceneScore:
    """A metric for `dg.evaluate`: share of prompts whose picture is right, for each kind of prompt and on average.

    `prompts` names the set; `count` takes as many prompts of each kind, all by default. Values carry the name of the
    set: `seen.score` with the bounds `seen.low` and `seen.high` of its 95 % interval, and `seen.counting` and so on.

    Raises `GraftError` for a count beyond the data, or no steps.
    """

    prompts: str = "seen"
    count: int | None = None
    size: int = 256
    steps: int = 16
    guidance: float = 3.0
    seed: int = 5

    def __post_init__(self):
        kinds = self._by_kind()
        fewest = min(len(lines) for lines in kinds.values())
        if self.count is not None and not 1 <= self.count <= fewest:
            raise GraftError(f"There are {fewest} prompts of each kind in {self.prompts!r}; got count={self.count}.")
        if self.steps < 1 or self.size < 8 or self.size % 8:
            raise GraftError(f"Pictures take 1 step or more and sides that are multiples of 8; got {self}.")

    def _by_kind(self) -> dict[str, list[dict[str, Any]]]:
        lines = load_prompts(self.prompts)
        kinds = {kind: [line for line in lines if line["tag"] == kind][: self.count] for kind in PROMPT_KINDS}
        return {kind: chosen for kind, chosen in kinds.items() if chosen}

    def metadata(self) -> list[dict[str, Any]]:
        """List the prompts that are drawn, in order."""
        return [line for lines in self._by_kind().values() for line in lines]

    def __call__(self, model: PixArtTransformer2DModel) -> dict[str, float]:
        return self.of_pipeline(pipeline(model))

    def of_pipeline(self, pipe: PixArtSigmaPipeline) -> dict[str, float]:
        """Score a pipeline."""
        metadata = self.metadata()
        texts = [line["prompt"] for line in metadata]
        pictures = draw_prompts(pipe, texts, size=self.size, steps=self.steps, guidance=self.guidance, seed=self.seed)
        return self.of_pictures(pictures)

    def of_pictures(self, pictures: torch.Tensor) -> dict[str, float]:
        """Score pictures that were drawn for `metadata()`, in its order."""
        metadata = self.metadata()
        if len(pictures) != len(metadata):
            raise GraftError(f"{len(metadata)} pictures are to be scored, one for each prompt; got {len(pictures)}.")
        verdicts: dict[str, list[bool]] = {}
        for line, found in zip(metadata, detect(pictures), strict=True):
            verdicts.setdefault(line["tag"], []).append(is_right(line, found))
        values = {kind: sum(right) / len(right) for kind, right in verdicts.items()}
        score, margin = mean_with_margin([(sum(right), len(right)) for right in verdicts.values()])
        values = {"score": score, "low": max(score - margin, 0.0), "high": min(score + margin, 1.0), **values}
        return {f"{self.prompts}.{name}": value for name, value in values.items()}


def mean_with_margin(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Compute the mean of shares (right, all) and half the width of its 95 % interval, for prompts as fixed strata."""
    mean = sum(right / count for right, count in counts) / len(counts)
    variance = 0.0
    # Each kind of prompt is a stratum of its own.
    for right, count in counts:
        # One right and one wrong answer more than seen: where all are right, the interval is still not empty.
        share = (right + 1) / (count + 2)
        variance += share * (1 - share) / count
    return mean, 1.96 * math.sqrt(variance) / len(counts)
