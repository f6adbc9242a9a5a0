"""Activations by diffusers' names, and the polynomials that approximate them on normal inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]


def _quick_gelu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * torch.sigmoid(1.702 * tensor)


# "geglu-approximate" is diffusers' name of an activation without a gate.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu-approximate": partial(F.gelu, approximate="tanh"),
    "geglu-approximate": _quick_gelu,
    "silu": F.silu,
    "swish": F.silu,
    "linear-silu": F.silu,
    "mish": F.mish,
    "relu": F.relu,
}

# Activations of a gate, which may also be a plain sigmoid.
GATES: dict[str, Activation] = {**ACTIVATIONS, "sigmoid": torch.sigmoid}

# The activation of the gate of a gated linear unit, by the unit's name.
GATED = {"glu": "sigmoid", "reglu": "relu", "geglu": "gelu", "swiglu": "silu"}


def gate_activation(name: str) -> Activation:
    """Return an activation by its name, or by that of the gated unit whose gate has it."""
    return GATES[GATED.get(name, name)]


def hermite_coefficients(
    activation: Activation, mean: torch.Tensor, deviation: torch.Tensor, degree: int
) -> torch.Tensor:
    """Compute the best polynomial for an activation of normal inputs, in powers of the standardised input.

    Args:
        mean, deviation: of each neuron's input, [hidden].
        degree: 1 or 2.

    Returns:
        [degree + 1, hidden] float64 coefficients c, with activation(mean + deviation * z) close to c0 + c1 z (+ c2
        z^2): least squares over standard normal z, from the Hermite expansion E[activation * He_n(z)] / n!.
    """
    z = torch.linspace(-8, 8, 513, dtype=torch.float64, device=mean.device)  # far and fine enough for float64
    # The trapezoidal rule converges faster than any power on a smooth integrand that fades at both ends.
    weight = torch.exp(-z.square() / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    outputs = activation(mean.double()[:, None] + deviation.double()[:, None] * z) * weight
    constant = outputs @ torch.ones_like(z)
    slope = outputs @ z
    if degree == 1:
        return torch.stack([constant, slope])
    curve = outputs @ ((z.square() - 1) / 2)
    return torch.stack([constant - curve, slope, curve])
