"""Feature maps of kernel attention, which take the place of the exponential: positive features of queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Least sum of weights: below what features of e^-40 make, and its inverse square, which gradients take, is a float32.
LEAST = 1e-18


def features_of(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Map [..., E] to as many features: `elu` (elu + 1), `relu` (a little above zero), or `softmax` over channels."""
    if name == "elu":
        # Outside autograd its plain function saves a step.
        return EluPlusOne.apply(tensor) if torch.is_grad_enabled() else EluPlusOne.forward(tensor)
    if name == "relu":
        return F.relu(tensor) + 1e-3
    return tensor.softmax(-1)


def turn_as(features: torch.Tensor, before: torch.Tensor, after: torch.Tensor, pairs: str) -> torch.Tensor:
    """Turn features as a rotary embedding turned the tensor they are of, [..., E] each.

    The angle of every pair of channels is read off the pair before and after it; a pair of zeros is not turned.

    Args:
        pairs: which channels are one: `neighbours`, or `halves` for each with the one half a head further on.
    """
    x, y = split_pairs(features, pairs)
    a, b = split_pairs(before, pairs)
    c, d = split_pairs(after, pairs)
    size = a.square() + b.square()
    is_zero = size == 0
    size = size.masked_fill(is_zero, 1)
    cosine = ((a * c + b * d) / size).masked_fill(is_zero, 1)
    sine = (a * d - b * c) / size
    turned = torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=-1)
    if pairs == "halves":
        turned = turned.transpose(-1, -2)
    return turned.flatten(-2)


def split_pairs(tensor: torch.Tensor, pairs: str) -> tuple[torch.Tensor, ...]:
    """Return the first and the second channels of all pairs, [..., E / 2] each."""
    if pairs == "halves":
        return tensor.chunk(2, dim=-1)
    return tensor.unflatten(-1, (-1, 2)).unbind(-1)


class EluPlusOne(torch.autograd.Function):
    """elu(x) + 1 without the slow part of elu, exp(x) - 1.

    Its slope, exp(x) up to zero and 1 from there on, is read off the result, which products need anyway: nothing more
    is saved.
    """

    @staticmethod
    def forward(tensor: torch.Tensor) -> torch.Tensor:
        above = F.relu(tensor)
        return (tensor - above).exp().add_(above)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (output,) = ctx.saved_tensors
        return grad * output.clamp(max=1)
