"""The Inception network of FID, by torch-fidelity's port of TensorFlow's of 2015."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core.storage import sha256_of
from ...errors import FileError, MissingDependencyError, ModelError
from .extractors import FEATURES, LOGITS, SPATIAL

_FILE = "weights-inception-2015-12-05-6726825d.pth"
_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_FILE}"
# FID is defined by these very weights. The file is a pickle, and is opened only where it is the one that is known.
_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_SPATIAL_CHANNELS = 7


class Inception(nn.Module):
    """Pooled features [B, 2048], spatial ones [B, 2023] and logits [B, 1008] of images [B, 3, H, W] in [0, 1].

    The spatial features are the first seven channels of the first convolution of the layer that TensorFlow's graph
    calls mixed_6, laid out as ADM's evaluator does, channels last. Logits have no bias, as there.

    Args:
        weights: the file; by default where torch.hub keeps its downloads.

    Raises `MissingDependencyError` without torch-fidelity, and `FileError` without the weights.
    """

    is_inception = True  # unnamed statistics of ADM are of its features

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MissingDependencyError(
                "FID's Inception network", "torch-fidelity with torchvision", extra="fid"
            ) from error
        path = find_weights(weights)
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
        # TensorFlow counts this block as the seventh from 0; "conv" is its first branch after the ReLU.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self.spatial = torch.empty(0)

    def _keep_spatial(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.spatial = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: torch.Tensor) -> dict[str, Any]:
        if images.shape[1] != 3:
            raise ModelError(f"Inception takes images of 3 channels; got {images.shape[1]}. Give another extractor.")
        # The network takes rounded pixels, as its authors saved samples before they measured them.
        features, logits = self.network((images * 255).round().byte())
        return {FEATURES: features, SPATIAL: self.spatial, LOGITS: logits}


def find_weights(path: str | Path | None = None) -> Path:
    """Return the file of Inception's weights.

    Raises `FileError` where it is not there, or is another file.
    """
    path = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / _FILE)
    if not path.is_file():
        raise FileError(f"Inception's weights are not at {path}. Download {_URL} to that place.")
    digest = sha256_of(path)
    if digest != _SHA256:
        raise FileError(
            f"{path} has the sha256 {digest[:12]}, and FID is defined by weights of sha256 {_SHA256[:12]}. Download "
            f"{_URL} again."
        )
    return path


@functools.cache
def open_inception() -> Inception:
    """Return one network for all metrics, on the GPU where there is one."""
    inception = Inception()
    if torch.cuda.is_available():
        inception.cuda()
    return inception
