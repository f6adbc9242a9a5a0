"""Losses of stage one, between the output of a new part and that of the original, both [B, ..., D] in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def relative_l2(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return |output - target|^2 / |target|^2 of each sample, averaged: the same scale at every site."""
    error = (output - target).flatten(1).square().sum(1)
    size = target.flatten(1).square().sum(1)
    # A sample may be masked to zeros.
    return (error / size.clamp(min=1e-12)).mean()


LOSSES: dict[str, Loss] = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss, "relative_l2": relative_l2}


def loss_for(kind: str, name: str) -> Loss:
    """Return a loss by name; `"auto"`, the paper's: `l1` for attention, `l2` for feed-forwards (section 3.1)."""
    if name != "auto":
        return LOSSES[name]
    # Outliers of attention outputs would dominate a squared error.
    return LOSSES["l2" if kind == "feed_forward" else "l1"]


def relative_error_and_cosine(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the relative error |output - target| / |target| and the cosine of two flattened tensors: [2]."""
    size = target.norm().clamp(min=1e-12)
    cosine = torch.dot(output.flatten(), target.flatten()) / (size * output.norm().clamp(min=1e-12))
    return torch.stack([(output - target).norm() / size, cosine])
