"""Pictures as files: PNG of rounded pixels, written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..core.storage import replace_file
from ..errors import FileError, MissingDependencyError


def import_pillow() -> Any:
    """Return Pillow's `Image`. Raises `MissingDependencyError` without it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("Pictures of samples", "Pillow", extra="eval") from error
    return Image


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    """Return images [B, C, H, W] in [0, 1] as rounded uint8 [B, H, W, C]."""
    return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().contiguous()


def read_picture(path: str | Path) -> torch.Tensor:
    """Read a picture, [C, H, W] in [0, 1]. Raises `FileError` for one that is missing or damaged."""
    import numpy as np

    try:
        with import_pillow().open(path) as image:
            pixels = torch.from_numpy(np.array(image))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}. Delete it; draw again.") from error
    # Grey pictures have no dimension of channels there.
    return pixels.view(*pixels.shape[:2], -1).permute(2, 0, 1) / 255


def write_picture(path: Path, pixels: torch.Tensor) -> None:
    """Write a picture, uint8 [H, W, C] of one channel or three."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Pillow takes grey pictures without a dimension of channels.
    image = import_pillow().fromarray(pixels.squeeze(2).numpy())
    with replace_file(path) as temporary:
        image.save(temporary, format="PNG")
