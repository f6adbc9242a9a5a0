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
