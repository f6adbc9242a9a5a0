"""What stage one measures between the answer of a new part and that of the old one, both [B, ..., D] in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def relative_l2(answer: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """|answer - wanted|^2 / |wanted|^2 of each sample, averaged: sites of all scales alike."""
    missed, size = ((tensor.flatten(1)).square().sum(1) for tensor in (answer - wanted, wanted))
    return (missed / size.clamp(min=1e-12)).mean()


LOSSES: dict[str, Loss] = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss, "relative_l2": relative_l2}


def loss_for(kind: str, name: str) -> Loss:
    """A loss by name; `"auto"` is the paper's choice, `l1` for attention and `l2` for feed-forwards (section 3.1)."""
    return LOSSES[name if name != "auto" else "l2" if kind == "feed_forward" else "l1"]


def likeness(answer: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Relative error |answer - wanted| / |wanted| and cosine of two tensors taken whole: [2]."""
    size = wanted.norm().clamp(min=1e-12)
    cosine = torch.dot(answer.flatten(), wanted.flatten()) / (size * answer.norm().clamp(min=1e-12))
    return torch.stack([(answer - wanted).norm() / size, cosine])
