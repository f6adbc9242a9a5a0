"""Many pictures in one file, to look at before a number is believed."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import MissingDependencyError


def save_picture_grid(path: str | Path, pictures: torch.Tensor, *, columns: int = 8) -> None:
    """Write pictures [B, 3, S, S] in [-1, 1] side by side, black where there is none left.

    Raises `MissingDependencyError` without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("Writing pictures", "Pillow", extra="eval") from error
    missing = -len(pictures) % columns
    size = pictures.shape[-1]
    black = pictures.new_full((missing, 3, size, size), -1.0)
    rows = torch.cat([pictures, black]).unflatten(0, (-1, columns))
    picture = rows.permute(0, 3, 1, 4, 2).reshape(-1, columns * size, 3)
    pixels = (picture.clamp(-1, 1) + 1) * 127.5
    Image.fromarray(pixels.round().byte().numpy()).save(path)
