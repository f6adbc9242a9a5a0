"""How far pictures are from those that the teacher draws from the same noise: PSNR, SSIM, LPIPS, feature distance.

Papers: SSIM, Wang et al. 2004; LPIPS, arXiv 1801.03924.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import FileError, MissingDependencyError, UnknownNameError
from .base import PictureMetric
from .extractors import FEATURES, extract

_LPIPS = ("alex", "vgg", "squeeze")


@dataclass(frozen=True, kw_only=True)
class PictureDistance(PictureMetric):
    """Distance of every picture from the teacher's of the same condition and seed, after the whole sampling run.

    Attributes:
        extractor: network of the feature distance, one minus the cosine, such as `ClipModel` or `DinoModel`; without
            one there is no such value.
        lpips: "alex", "vgg" or "squeeze", or a network from two images in [-1, 1] to distances [B]; none by default.
    """

    needs_teacher: ClassVar[bool] = True

    extractor: nn.Module | None = None
    lpips: str | nn.Module | None = None

    def check(self, conditions: Sequence[Any]) -> None:
        _import_torchmetrics()
        self._open_lpips()

    def _open_lpips(self) -> Any:
        return open_lpips(self.lpips) if isinstance(self.lpips, str) else self.lpips

    def measure(
        self, pictures: torch.Tensor, conditions: Sequence[Any], teacher_pictures: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        assert teacher_pictures is not None
        library = _import_torchmetrics()
        psnr = library.peak_signal_noise_ratio(
            pictures, teacher_pictures, data_range=1.0, dim=(1, 2, 3), reduction="none"
        )
        ssim = library.structural_similarity_index_measure(
            pictures, teacher_pictures, data_range=1.0, reduction="none"
        )
        # Of a single picture torchmetrics returns a number without a dimension.
        numbers = {"psnr": psnr, "ssim": ssim.reshape(len(pictures))}
        # Embeddings differ in direction; their length says little about what is seen.
        if self.extractor is not None:
            one = extract(self.extractor, pictures, FEATURES)
            other = extract(self.extractor, teacher_pictures, FEATURES)
            numbers["feature_distance"] = 1 - F.cosine_similarity(one, other)
        network = self._open_lpips()
        if network is not None:
            distances = network(_for_lpips(pictures), _for_lpips(teacher_pictures))
            numbers["lpips"] = distances.detach().reshape(len(pictures)).cpu()
        return numbers


def _for_lpips(pictures: torch.Tensor) -> torch.Tensor:
    """Return pictures in [-1, 1] with three channels, which all its networks take."""
    return pictures.expand(-1, 3, -1, -1) * 2 - 1


@functools.cache
def open_lpips(name: str) -> nn.Module:
    """Return LPIPS by one of its networks.

    Raises `MissingDependencyError` without the library, and `FileError` without the weights of its network.
    """
    try:
        import lpips
    except ImportError as error:
        raise MissingDependencyError("LPIPS", "lpips with torchvision", extra="lpips") from error
    if name not in _LPIPS:
        raise UnknownNameError("network of LPIPS", name, _LPIPS)
    try:
        return lpips.LPIPS(net=name, verbose=False).eval().requires_grad_(False)
    except OSError as error:
        raise FileError(
            f"LPIPS needs torchvision's weights of {name}, which are not on this machine and could not be downloaded "
            f"({error}). Run `python -c 'import lpips; lpips.LPIPS(net=\"{name}\")'` where there is a network."
        ) from error


def _import_torchmetrics() -> Any:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise MissingDependencyError("PSNR and SSIM", "torchmetrics", extra="eval") from error
    return image
