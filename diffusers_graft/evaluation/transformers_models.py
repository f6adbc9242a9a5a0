"""CLIP and DINOv2 of transformers, as extractors of features from images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import FileError
from .pictures import as_pixels


def load_pretrained_part(load: Callable[..., Any], name: str, who: str, **settings: Any) -> Any:
    """Return a part of a pretrained model, by `from_pretrained` of its class.

    Raises `FileError` where its files are neither here nor could be downloaded.
    """
    try:
        return load(name, **settings)
    except (OSError, ValueError) as error:
        raise FileError(
            f"{who} needs {name}, which is not on this machine and could not be downloaded ({_first_line(error)}). "
            f"Run `hf download {name}` where there is a network, or give a folder that holds it."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def load_image_processor(name: str, who: str) -> Any:
    """Return what turns images into a model's input, the one that computes on the CPU by Pillow.

    The others resize a little differently, and would give other numbers.
    """
    import transformers
    from transformers import AutoImageProcessor

    # Its name before transformers 5.
    settings: dict[str, Any] = {"use_fast": False}
    if int(transformers.__version__.partition(".")[0]) >= 5:
        settings = {"backend": "pil"}
    return load_pretrained_part(AutoImageProcessor.from_pretrained, name, who, **settings)


class _TransformersModel(nn.Module):
    """A pretrained model with its preprocessing."""

    model: Any

    def __init__(self, model: nn.Module, processor: Any, settings: dict[str, Any]):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.settings = settings

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Return the model's input for images [B, C, H, W] in [0, 1]."""
        pixels = as_pixels(images.expand(-1, 3, -1, -1))
        prepared = self.processor(images=list(pixels.numpy()), return_tensors="pt", **self.settings)
        return prepared["pixel_values"].to(next(self.model.parameters()).device)


class ClipModel(_TransformersModel):
    """Embeddings of CLIP, of images [B, C, H, W] in [0, 1] and of texts.

    Args:
        name: a repository or a folder of a `CLIPModel`.

    Raises `FileError` where its weights are missing.
    """

    def __init__(self, name: str):
        from transformers import AutoTokenizer, CLIPModel

        who = "CLIP"
        model = load_pretrained_part(CLIPModel.from_pretrained, name, who)
        super().__init__(model, load_image_processor(name, who), {})
        self.tokenizer = load_pretrained_part(AutoTokenizer.from_pretrained, name, who)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        vision = self.model.vision_model(pixel_values=self.prepare(images))
        return self.model.visual_projection(vision.pooler_output)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit embeddings of texts, [n, F]."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        output = self.model.text_model(**tokens.to(next(self.model.parameters()).device))
        return F.normalize(self.model.text_projection(output.pooler_output), dim=1)

    @torch.no_grad()
    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings of images [B, C, H, W] in [0, 1], [B, F]."""
        return F.normalize(self(images), dim=1)


class DinoModel(_TransformersModel):
    """Class token of DINOv2 for images [B, C, H, W] in [0, 1], resized to 224 x 224 as FD-DINOv2's authors do.

    Args:
        name: a repository or a folder of a `Dinov2Model`.

    Raises `FileError` where its weights are missing.
    """

    def __init__(self, name: str = "facebook/dinov2-large"):
        from transformers import AutoModel

        who = "DINOv2"
        model = load_pretrained_part(AutoModel.from_pretrained, name, who)
        # No crop: its authors show the network whole pictures.
        settings = {"size": {"height": 224, "width": 224}, "do_center_crop": False}
        super().__init__(model, load_image_processor(name, who), settings)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=self.prepare(images)).last_hidden_state[:, 0]


@functools.lru_cache(maxsize=2)
def open_clip(name: str) -> ClipModel:
    """Return one network for all metrics, on the GPU where there is one."""
    return move_to_gpu(ClipModel(name))


@functools.lru_cache(maxsize=1)
def open_dino() -> DinoModel:
    """Return one network for all metrics, on the GPU where there is one."""
    return move_to_gpu(DinoModel())


def move_to_gpu(network: Any) -> Any:
    """Return a network on the GPU where there is one."""
    return network.cuda() if torch.cuda.is_available() else network
