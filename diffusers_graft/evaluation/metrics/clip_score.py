"""CLIPScore, how near a picture is to its prompt. Paper: arXiv 2104.08718."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conditions import texts_of
from ..transformers_models import open_clip
from .base import PictureMetric
from .extractors import describe_network


@dataclass(frozen=True, kw_only=True)
class CLIPScore(PictureMetric):
    """100 times the cosine between the embeddings of picture and prompt, no less than 0.

    Attributes:
        clip: a `ClipModel`; by default ViT-L/14 of OpenAI.
    """

    clip: nn.Module | None = None

    def _open_clip(self) -> Any:
        if self.clip is not None:
            return self.clip
        return open_clip("openai/clip-vit-large-patch14")

    def check(self, conditions: Sequence[Any]) -> None:
        texts_of(conditions, type(self).__name__)
        self._open_clip()

    def measure(
        self, pictures: torch.Tensor, conditions: Sequence[Any], teacher_pictures: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        clip = self._open_clip()
        texts = clip.embed_texts(texts_of(conditions, type(self).__name__))
        # Both are of unit length.
        cosine = (clip.embed_images(pictures) * texts).sum(1)
        return {"clip_score": 100 * cosine.clamp(min=0).cpu()}

    def protocol(self) -> dict[str, Any]:
        return {"clip": describe_network(self._open_clip())}
