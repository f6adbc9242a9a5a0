"""The networks of GenEval's scorer: Mask2Former finds objects, CLIP names their colours."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..pictures import as_pixels
from ..transformers_models import (
    ClipModel,
    load_image_processor,
    load_pretrained_part,
    move_to_gpu,
)
from .prompts import COLOURS
from .rules import Detection

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLOUR_MODEL = "openai/clip-vit-large-patch14"
# GenEval's words for three classes of COCO.
_RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
_TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
_BACKGROUND = 0x99 / 255  # grey, as the original paints what is not the object
_LEAST_SCORE = 0.3


class Detector(nn.Module):
    """Mask2Former, trained on COCO.

    Args:
        name: a repository or a folder of a `Mask2FormerForUniversalSegmentation`.

    Raises `FileError` where its weights are missing.
    """

    def __init__(self, name: str = DETECTOR):
        super().__init__()
        from transformers import Mask2FormerForUniversalSegmentation

        who = "GenEval's detector"
        model = load_pretrained_part(Mask2FormerForUniversalSegmentation.from_pretrained, name, who)
        self.model = model.eval().requires_grad_(False)
        self.processor = load_image_processor(name, who)

    @property
    def labels(self) -> dict[int, str]:
        """Classes by number, in GenEval's words."""
        names: dict[int, str] = self.model.config.id2label
        return {int(number): _RENAMED.get(name, name) for number, name in names.items()}

    @torch.no_grad()
    def detect(self, pictures: torch.Tensor) -> list[list[Detection]]:
        """Find the objects of pictures [B, 3, H, W] in [0, 1]."""
        pixels = list(as_pixels(pictures).numpy())
        prepared = self.processor(images=pixels, return_tensors="pt")
        outputs = self.model(pixel_values=prepared["pixel_values"].to(next(self.model.parameters()).device))
        # Masks are put together on the CPU there, whatever device they come from.
        outputs.class_queries_logits = outputs.class_queries_logits.cpu()
        outputs.masks_queries_logits = outputs.masks_queries_logits.cpu()
        size = (pictures.shape[2], pictures.shape[3])
        results = self.processor.post_process_instance_segmentation(
            outputs, threshold=_LEAST_SCORE, target_sizes=[size] * len(pictures), return_binary_maps=True
        )
        return [self._read(result) for result in results]

    def _read(self, result: dict[str, Any]) -> list[Detection]:
        found = []
        # Without any object there is one map of no object.
        for info, mask in zip(result["segments_info"], result["segmentation"], strict=False):
            mask = mask.bool().cpu()
            # A mask may vanish where it is brought to the size of the picture.
            if mask.any():
                found.append(Detection(self.labels[info["label_id"]], _box_of(mask), info["score"], mask))
        return found


def _box_of(mask: torch.Tensor) -> tuple[float, float, float, float]:
    rows = mask.any(1).nonzero()
    columns = mask.any(0).nonzero()
    # The box ends after the last pixel, as mmdetection has it.
    return (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)


class ColourClassifier:
    """Colours of objects by CLIP, which compares each, cut out and on grey, with three phrases for every colour.

    Args:
        clip: by default ViT-L/14 of OpenAI.
    """

    def __init__(self, clip: ClipModel):
        self.clip = clip
        self.phrases: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def classify(self, picture: torch.Tensor, label: str, objects: Sequence[Detection]) -> list[str]:
        """Name the colour of objects of one class in a picture [3, H, W] in [0, 1]."""
        names = []
        for one in objects:
            embedding = self.clip.embed_images(cut_out(picture, one)[None])
            names.append(COLOURS[int((embedding @ self._embed_phrases(label).T).argmax())])
        return names

    def _embed_phrases(self, label: str) -> torch.Tensor:
        if label not in self.phrases:
            means = []
            for colour in COLOURS:
                texts = [template.format(colour=colour, label=label) for template in _TEMPLATES]
                # The mean of phrases is a better name than any of them.
                means.append(self.clip.embed_texts(texts).mean(0))
            self.phrases[label] = F.normalize(torch.stack(means), dim=1)
        return self.phrases[label]


def cut_out(picture: torch.Tensor, one: Detection) -> torch.Tensor:
    """Return the part of a picture within an object's box, grey where the object is not."""
    if one.mask is not None:
        picture = torch.where(one.mask, picture, torch.full_like(picture, _BACKGROUND))
    left, top, right, bottom = map(round, one.box)
    return picture[:, top:bottom, left:right]


@functools.lru_cache(maxsize=1)
def open_classifier(clip: ClipModel) -> ColourClassifier:
    """Return the classifier of a network, which has embedded some phrases already."""
    return ColourClassifier(clip)


@functools.cache
def open_detector() -> Detector:
    """Return one network for all evaluations, on the GPU where there is one."""
    return move_to_gpu(Detector())
