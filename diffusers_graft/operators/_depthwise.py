"""Depthwise convolutions over tokens: how heads become an image, and what such a convolution is by definition."""
from __future__ import annotations

import torch
import torch.nn.functional as F


def tokens_last(part: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, H, N, E] -> [B * N / (height * width), height, width, H * E]: how a channels-last image lies in memory."""
    return part.transpose(1, 2).reshape(-1, height, width, part.shape[1] * part.shape[3])


def by_taps(
    image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, before: tuple[int, int]
) -> torch.Tensor:  # fmt: skip
    """The definition of a depthwise convolution of [B, height, width, D] under weights [D, 1, rows, columns].

    Every tap by itself, on a copy padded with `before` zeros above and left of the image, and the rest below and right.
    """
    height, width = image.shape[1:3]
    rows, columns = weight.shape[2:]
    top, left = before
    padded = F.pad(image, (0, 0, left, columns - 1 - left, top, rows - 1 - top))
    taps = [(y, x) for y in range(rows) for x in range(columns)]
    return bias + sum(weight[:, 0, y, x] * padded[:, y : y + height, x : x + width] for y, x in taps)
