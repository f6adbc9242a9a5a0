"""ImageReward and HPSv2, what people prefer as two networks learned it. Papers: arXiv 2304.05977 and 2306.09341."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import MissingDependencyError
from ..conditions import texts_of
from ..pictures import as_pixels
from .base import PictureMetric


@dataclass(frozen=True, kw_only=True)
class ImageReward(PictureMetric):
    """Reward of picture and prompt by the library of the same name; its scores have mean 0 and deviation 1 there.

    Attributes:
        version: a name that the library knows, or a file.
    """

    version: str = "ImageReward-v1.0"

    def check(self, conditions: Sequence[Any]) -> None:
        texts_of(conditions, type(self).__name__)
        _load_image_reward(self.version)

    def measure(
        self, pictures: torch.Tensor, conditions: Sequence[Any], teacher_pictures: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        model = _load_image_reward(self.version)
        scores = []
        # The library scores one picture at a time.
        for text, picture in zip(texts_of(conditions, type(self).__name__), _as_pil(pictures), strict=True):
            scores.append(model.score(text, picture))
        return {"image_reward": torch.tensor(scores)}


@functools.cache
def _load_image_reward(version: str) -> Any:
    try:
        import ImageReward as library  # noqa: N813  # the name of the package
    except ImportError as error:
        raise MissingDependencyError("ImageReward", "image-reward", extra="image-reward") from error
    return library.load(version)


@dataclass(frozen=True, kw_only=True)
class HPSv2(PictureMetric):
    """Human preference score of picture and prompt, by the library `hpsv2`.

    Attributes:
        version: "v2.0" or "v2.1".
    """

    version: str = "v2.1"

    def check(self, conditions: Sequence[Any]) -> None:
        texts_of(conditions, type(self).__name__)
        _load_hps()

    def measure(
        self, pictures: torch.Tensor, conditions: Sequence[Any], teacher_pictures: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        library = _load_hps()
        scores = []
        for text, picture in zip(texts_of(conditions, type(self).__name__), _as_pil(pictures), strict=True):
            # It returns a list, also for one picture.
            scores.append(float(library.score(picture, text, hps_version=self.version)[0]))
        return {"hps": torch.tensor(scores)}


def _load_hps() -> Any:
    try:
        import hpsv2
    except ImportError as error:
        raise MissingDependencyError("HPSv2", "hpsv2", extra="hps") from error
    return hpsv2


def _as_pil(pictures: torch.Tensor) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(pixels) for pixels in as_pixels(pictures.expand(-1, 3, -1, -1)).numpy()]
