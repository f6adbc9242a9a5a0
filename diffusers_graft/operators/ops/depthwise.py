"""Depthwise convolutions over tokens: how heads become an image, and such a convolution by its definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core.context import Grid
from .backends import compute_dtype

# Convolves an image of tokens with one of an operator's convolutions: fast, padded or tap by tap.
Convolve = Callable[[Any, torch.Tensor], torch.Tensor]

LAYOUTS = ("causal_1d", "centered_1d", "2d", "3d")


def tokens_last(part: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Lay heads out as a channels-last image: [B, H, N, E] -> [B * N / (height * width), height, width, H * E]."""
    return part.transpose(1, 2).reshape(-1, height, width, part.shape[1] * part.shape[3])


def heads_first(image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Turn an image back into heads: [images, height, width, H * E] -> [B, H, N, E] as `like`."""
    batch, heads, tokens, width = like.shape
    return image.reshape(batch, tokens, heads, width).transpose(1, 2)


def pool_tokens(
    part: torch.Tensor, grid: Grid, stride: int, convolve: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Pool squares of tokens, frame by frame: [B, H, N, E] -> [B, H, M, E].

    Args:
        stride: side of a square; where the grid does not divide, its last row and column are repeated.
        convolve: a convolution of that stride, [images, D, rows, columns] in and out, channels last in memory.
    """
    _, heads, _, width = part.shape
    image = tokens_last(part, grid.height, grid.width).permute(0, 3, 1, 2)
    right = -grid.width % stride
    below = -grid.height % stride
    if right or below:
        image = F.pad(image, (0, right, 0, below), mode="replicate").contiguous(memory_format=torch.channels_last)
    pooled = convolve(image).permute(0, 2, 3, 1)
    tokens_first = pooled.unflatten(0, (-1, grid.frames)).flatten(1, 3)
    return tokens_first.unflatten(2, (heads, width)).transpose(1, 2)


def count_pooled(grid: Grid | None, tokens: int, stride: int) -> int:
    """Count the tokens that are left; of an unknown grid, as many as of one that divides."""
    if grid is None:
        return tokens // stride**2
    return grid.frames * -(-grid.height // stride) * -(-grid.width // stride)


class ShortConvolution(nn.Conv2d):
    """One filter a channel, on images of tokens [B, height, width, D] in and out.

    Args:
        width: channels (D).
        size: taps along each axis.
        layout: `2d`, or `causal_1d` and `centered_1d` for sequences, which are images one token wide: [B, N, 1, D].
    """

    bias: nn.Parameter

    def __init__(self, width: int, size: int, layout: str = "2d"):
        is_image = layout == "2d"
        super().__init__(width, width, (size, size if is_image else 1), groups=width)
        before = size - 1 if layout == "causal_1d" else size // 2
        self.before = (before, before if is_image else 0)

    @torch.no_grad()
    def set_identity(self) -> None:
        """Pass on the input as it is."""
        self.set_constant(0.0)
        self.weight[:, :, self.before[0], self.before[1]] = 1.0

    @torch.no_grad()
    def set_constant(self, value: float) -> None:
        """Give `value` for any input."""
        self.weight.zero_()
        self.bias.fill_(value)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Convolve with channels last in memory, padded as far as `reach` on both sides: the longer of the two."""
        if torch.compiler.is_compiling():
            # One kernel with the gates around it, forward and backward.
            return self.by_taps(image).to(compute_dtype(image))
        reach = [max(before, size - 1 - before) for size, before in zip(self.kernel_size, self.before, strict=True)]
        # Channels stay last in memory: on CPUs depthwise convolutions are several times faster so.
        image = image.permute(0, 3, 1, 2)
        if torch.is_grad_enabled():
            # On CPU the gradient of a filter takes ten times as long unless it is odd and in the middle of its
            # padding.
            weight = self._centre_weight(reach)
            top = 0
            left = 0
        else:
            weight = self.weight
            top, left = (most - before for most, before in zip(reach, self.before, strict=True))
        convolved = F.conv2d(image, weight, self.bias, padding=reach, groups=self.groups)
        return convolved[:, :, top : top + image.shape[2], left : left + image.shape[3]].permute(0, 2, 3, 1)

    def _centre_weight(self, reach: list[int]) -> torch.Tensor:
        """Pad the filter with zeros to as many taps on both sides."""
        zeros = []
        for size, before, most in zip(self.kernel_size, self.before, reach, strict=True):
            zeros = [most - before, most - (size - 1 - before), *zeros]  # `pad` takes the last axis first
        return F.pad(self.weight, zeros)

    def padded(self, image: torch.Tensor) -> torch.Tensor:
        """Convolve a padded copy with the taps there are, which is what torch's FLOP counter should count."""
        top, left = self.before
        rows, columns = self.kernel_size
        image = F.pad(image, (0, 0, left, columns - 1 - left, top, rows - 1 - top)).permute(0, 3, 1, 2)
        return F.conv2d(image, self.weight, self.bias, groups=self.groups).permute(0, 2, 3, 1)

    def by_taps(self, image: torch.Tensor) -> torch.Tensor:
        """Convolve by definition: tap by tap, on the image moved by as far as the tap reaches, with zeros around it.

        Pointwise, so that a compiler makes one kernel of it and of the operations around it.
        """
        _, height, width, _ = image.shape
        rows, columns = self.kernel_size
        top, left = self.before
        y = torch.arange(height, device=image.device)
        x = torch.arange(width, device=image.device)
        steps = itertools.product(range(-top, rows - top), range(-left, columns - left))
        taps = torch.stack(self.weight.flatten(1).unbind(1))  # [taps, D], each in one piece of memory
        convolved: torch.Tensor = self.bias
        for tap, (down, right) in zip(taps, steps, strict=True):
            inside = ((y + down >= 0) & (y + down < height))[:, None] & (x + right >= 0) & (x + right < width)
            convolved = convolved + tap * torch.where(inside[..., None], image.roll((-down, -right), (1, 2)), 0)
        return convolved

    def flops(self, tokens: int) -> int:
        """Count the multiply-adds of its taps, two each."""
        rows, columns = self.kernel_size
        return 2 * rows * columns * tokens * self.in_channels


class VideoConvolution(nn.Conv3d):
    """One filter a channel, on videos of tokens [B, frames, height, width, D] in and out.

    Args:
        width: channels (D).
        size: taps along each axis; an even filter reaches one token further back.
    """

    bias: nn.Parameter

    def __init__(self, width: int, size: int):
        super().__init__(width, width, size, groups=width)

    @torch.no_grad()
    def set_identity(self) -> None:
        """Pass on the input as it is."""
        self.set_constant(0.0)
        middle = self.kernel_size[0] // 2
        self.weight[:, :, middle, middle, middle] = 1.0

    @torch.no_grad()
    def set_constant(self, value: float) -> None:
        """Give `value` for any input."""
        self.weight.zero_()
        self.bias.fill_(value)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Convolve frame by frame with each slice of the filter, and add up: depthwise in 3-D is slow on CPUs."""
        batch, frames = video.shape[:2]
        padded = self._pad(video)
        convolved: Any = 0
        for step in range(self.kernel_size[0]):
            images = padded[:, step : step + frames].flatten(0, 1).permute(0, 3, 1, 2)
            bias = self.bias if step == 0 else None
            convolved = convolved + F.conv2d(images, self.weight[:, :, step], bias, groups=self.groups)
        return convolved.permute(0, 2, 3, 1).unflatten(0, (batch, frames))

    # There are no outputs beyond the border to leave out.
    padded = forward

    def by_taps(self, video: torch.Tensor) -> torch.Tensor:
        """Convolve by definition: tap by tap, on the video moved as far as the tap reaches, zeros around it."""
        _, frames, height, width, _ = video.shape
        padded = self._pad(video)
        convolved: torch.Tensor = self.bias
        for t, y, x in itertools.product(range(self.kernel_size[0]), repeat=3):
            moved = padded[:, t : t + frames, y : y + height, x : x + width]
            convolved = convolved + self.weight[:, 0, t, y, x] * moved
        return convolved

    def _pad(self, video: torch.Tensor) -> torch.Tensor:
        before = self.kernel_size[0] // 2
        after = self.kernel_size[0] - 1 - before
        return F.pad(video, (0, 0, *(before, after) * 3))

    def flops(self, tokens: int) -> int:
        """Count the multiply-adds of its taps, two each."""
        return 2 * self.kernel_size[0] ** 3 * tokens * self.in_channels


class ShortConvolutions(nn.ModuleDict):
    """Convolutions of queries, keys and values by name."""

    def __getitem__(self, name: str) -> ShortConvolution:
        return super().__getitem__(name)  # pyright: ignore[reportReturnType]  # nothing else is put in

    def values(self) -> Iterable[ShortConvolution]:  # pyright: ignore[reportIncompatibleMethodOverride]  # as above
        return super().values()  # pyright: ignore[reportReturnType]  # as above
