"""Reference sets for distributional metrics: statistics, features and images in one npz file.

ADM's files (`VIRTUAL_imagenet256_labeled.npz` and the like) are read as they are: `mu`, `sigma` of pooled features,
`mu_s`, `sigma_s` of spatial ones, images `arr_0`. Ours have the same names, features, and the name of the extractor.
"""

from __future__ import annotations

import contextlib
import functools
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ...core.progress import hide_bar
from ...core.storage import replace_file, sha256_of
from ...errors import FileError, MismatchError
from ..pictures import as_pixels
from .base import FeatureMetric
from .extractors import FEATURES, SPATIAL, describe_network, extract, run_extractor, select_output
from .frechet_distance import FeatureStatistics, RunningStatistics

_IMAGES = "arr_0"
_STATISTICS = {FEATURES: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
_BATCH = 64


class Reference:
    """A file of reference statistics, features or images.

    Attributes:
        sha256: of the file, the first 12 digits; part of the protocol of every number that was measured with it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.sha256 = sha256_of(path)[:12]
        try:
            with np.load(path) as arrays:
                self.names = set(arrays.files)
                self.arrays = {name: arrays[name] for name in self.names - {_IMAGES}}
        except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
            raise FileError(
                f"{path} is no file of reference statistics ({error}). Download or make it again."
            ) from error
        if not {"mu", FEATURES, _IMAGES} & self.names:
            raise FileError(
                f"{path} holds {', '.join(sorted(self.names)) or 'nothing'}; reference statistics are mu and sigma, "
                "features, or images arr_0. Make such a file with save_reference."
            )
        self.extracted: dict[tuple[nn.Module, str], torch.Tensor] = {}

    def statistics(self, extractor: nn.Module, output: str) -> FeatureStatistics:
        """Return mean and covariance of one output of an extractor.

        Raises `MismatchError` for statistics of other features, and `FileError` where the file has none.
        """
        self._require_same_features(extractor)
        # Statistics without a name are those of Inception, as ADM's; images say more to any other network.
        mean, covariance = _STATISTICS.get(output, ("", ""))
        if mean in self.names and (self._is_labelled or _is_inception(extractor) or _IMAGES not in self.names):
            return FeatureStatistics(_as_tensor(self.arrays[mean]), _as_tensor(self.arrays[covariance]))
        return FeatureStatistics.of(self.features(extractor, output))

    def features(self, extractor: nn.Module, output: str) -> torch.Tensor:
        """Return the features [N, F] of the reference images.

        Raises `MismatchError` for features of another extractor, and `FileError` where there are statistics alone.
        """
        self._require_same_features(extractor)
        if output == FEATURES and FEATURES in self.names:
            return torch.from_numpy(self.arrays[FEATURES])
        if _IMAGES not in self.names:
            raise FileError(
                f"{self.path} holds statistics, and neither {output!r} of {type(extractor).__name__} nor images to "
                "make them from. Make such a file with save_reference."
            )
        key = (extractor, output)
        if key not in self.extracted:
            bar = tqdm(
                read_images(self.path), desc=f"reference {output}", unit="batch", disable=hide_bar(True), leave=False
            )
            self.extracted[key] = torch.cat([extract(extractor, images, output) for images in bar])
        return self.extracted[key]

    @property
    def _is_labelled(self) -> bool:
        return "extractor" in self.names

    def _require_same_features(self, extractor: nn.Module) -> None:
        if not self._is_labelled:
            return
        made_by = str(self.arrays["extractor"])
        described = describe_network(extractor)
        if made_by != described:
            raise MismatchError(
                f"{self.path} holds features of {made_by}, and the metric's extractor is {described}. Measure with "
                "the same one, or make the file again with save_reference."
            )

    def __repr__(self) -> str:
        return self.sha256


@dataclass(frozen=True, kw_only=True)
class ReferenceMetric(FeatureMetric):
    """Base of metrics that compare features of samples with those of a reference set.

    Attributes:
        reference: a file of ADM or of `save_reference`, or one that is open.
    """

    reference: str | Path | Reference

    def open_reference(self) -> Reference:
        """Return the reference set. Raises `FileError` where there is none."""
        return open_reference(self.reference)

    def reference_features(self) -> torch.Tensor:
        """Return the features [M, F] of the reference images."""
        return self.open_reference().features(self.open_extractor(), self.output)

    def reference_width(self) -> int:
        """Return the width of the reference features."""
        return self.reference_features().shape[1]

    def check_features(self, features: torch.Tensor) -> None:
        width = self.reference_width()
        if features.shape[1] != width:
            raise MismatchError(
                f"{type(self).__name__} compares {features.shape[1]:,} features with a reference of {width:,}: "
                f"{self.open_reference().path} was made with another extractor."
            )

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "reference": self.open_reference().sha256}


@functools.lru_cache(maxsize=4)
def _open(path: Path, modified: int) -> Reference:
    return Reference(path)


def open_reference(reference: str | Path | Reference) -> Reference:
    """Return a reference set; several metrics that name one file share it. Raises `FileError` for a damaged file."""
    if isinstance(reference, Reference):
        return reference
    path = Path(reference)
    if not path.is_file():
        raise FileError(
            f"There are no reference statistics at {path}. ADM's for ImageNet at 256 pixels are "
            "VIRTUAL_imagenet256_labeled.npz, which the README of openai/guided-diffusion's evaluations links to; "
            "save_reference makes others."
        )
    return _open(path, path.stat().st_mtime_ns)


def save_reference(
    path: str | Path, images: Iterable[torch.Tensor], extractor: nn.Module, *, keep: int = 10_000
) -> Reference:
    """Save statistics of all images, and the features of the first `keep`, for later measurements.

    Args:
        images: batches [B, C, H, W] in [0, 1].

    Raises `FileError` where the file is there already, or cannot be written.
    """
    require_absent(path)
    running = {name: RunningStatistics() for name in _STATISTICS}
    # Kernels and nearest neighbours need features themselves, of a sample of the images.
    kept: list[torch.Tensor] = []
    count = 0
    for batch in images:
        outputs = run_extractor(extractor, batch)
        features = select_output(outputs, FEATURES, extractor, len(batch))
        running[FEATURES].update(features)
        if isinstance(outputs, dict) and SPATIAL in outputs:
            running[SPATIAL].update(select_output(outputs, SPATIAL, extractor, len(batch)))
        kept.append(features[: max(keep - count, 0)])
        count += len(features)
    arrays: dict[str, Any] = {"extractor": describe_network(extractor)}
    if keep:
        arrays[FEATURES] = torch.cat(kept).numpy()
    for output, (mean, covariance) in _STATISTICS.items():
        if running[output].count:
            statistics = running[output].result()
            arrays[mean] = statistics.mean.numpy()
            arrays[covariance] = statistics.covariance.numpy()
    with replace_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return Reference(path)


def read_images(path: str | Path, batch_size: int = _BATCH) -> Iterator[torch.Tensor]:
    """Read images [B, C, H, W] in [0, 1] from an npz file, `arr_0` of uint8 [N, H, W, C], a batch at a time.

    Raises `FileError` for a file without such images.
    """
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            file = stack.enter_context(archive.open(f"{_IMAGES}.npy"))
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read_header = np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read_header(file)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise FileError(f"{path} holds no images arr_0 ({error}).") from error
        if len(shape) != 4 or is_fortran or dtype != np.uint8:
            raise FileError(f"Images arr_0 are uint8 [N, H, W, C]; {path} has {dtype} {shape}.")
        size = int(np.prod(shape[1:]))
        for start in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - start)
            # Only this batch is in memory: the file of ADM has two gigabytes.
            data = bytearray(file.read(count * size))
            if len(data) < count * size:
                raise FileError(f"{path} ends after {start:,} of {shape[0]:,} images. Download or save it again.")
            yield torch.frombuffer(data, dtype=torch.uint8).view(count, *shape[1:]).permute(0, 3, 1, 2) / 255


def write_images(path: str | Path, batches: Iterable[torch.Tensor], count: int) -> None:
    """Write images as ADM's evaluator reads them, `arr_0` of uint8 [N, H, W, C], a batch at a time.

    Args:
        batches: images [B, C, H, W] in [0, 1], `count` in all.

    Raises `FileError` where the file is there already, or cannot be written.
    """
    require_absent(path)
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(replace_file(path)), "w"))
        file = stack.enter_context(archive.open(f"{_IMAGES}.npy", "w", force_zip64=True))
        for number, images in enumerate(batches):
            pixels = as_pixels(images)
            # The shape is known with the first images, and stands at the head of the file.
            if number == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *pixels.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(pixels.numpy().tobytes())


def require_absent(path: str | Path) -> None:
    """Raise `FileError` where something is at a path already."""
    if Path(path).exists():
        raise FileError(f"{path} is there already. Give another name, or move it away.")


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).double()


def _is_inception(extractor: nn.Module) -> bool:
    return bool(getattr(extractor, "is_inception", False))
