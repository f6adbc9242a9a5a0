"""What feed-forwards with a hidden layer share: their settings, their width, which neurons they keep of the original."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from ...core.sites import Site
from ...errors import OperatorError, UnknownNameError
from ..base import FeedForwardOperator, LinearPair
from .activations import ACTIVATIONS, GATED, hermite_coefficients


def require_count(who: str, name: str, value: Any, least: int, example: int) -> None:
    """Raise `OperatorError` unless `value` is a whole number from `least`."""
    if type(value) is not int or value < least:
        raise OperatorError(f"{who}: {name} is a whole number from {least}; got {value!r}. Try {example}.")


def require_ratio(who: str, value: Any) -> None:
    """Raise `OperatorError` unless `value` can be an expansion."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise OperatorError(f"{who}: expansion is a positive ratio; got {value!r}. Try 3, 4 or 6.")


@dataclass(frozen=True, kw_only=True)
class ActivatedConfig(FeedForwardOperator.Config):
    """Settings of a feed-forward with an activation.

    Attributes:
        activation: diffusers' name; None means that of the replaced feed-forward.
    """

    activation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.activation is not None:
            self.check_activation(self.activation)

    @classmethod
    def activations(cls) -> Collection[str]:
        """The names it accepts."""
        return ACTIVATIONS

    def check_activation(self, name: str) -> None:
        """Raise `OperatorError` for an activation that needs a gate, `UnknownNameError` for one that does not exist."""
        if isinstance(name, str) and name in self.activations():
            return
        if isinstance(name, str) and name in GATED:
            raise OperatorError(
                f"{self.owner.name}: {name} is gated, which takes a second input layer that {self.owner.name} has not. "
                f"Choose gated_mlp, or name one of {', '.join(sorted(self.activations()))}."
            )
        raise UnknownNameError(f"activation of {self.owner.name}", name, self.activations())

    def resolved(self, site: Site) -> Self:
        if self.activation is not None:
            return self
        if site.activation not in (*self.activations(), *GATED):
            what = f" ({site.activation})" if site.activation else ""
            raise OperatorError(
                f"{self.owner.name}: the activation of {site.path}{what} is not known. "
                f"Name one of {', '.join(sorted(self.activations()))}."
            )
        return replace(self, activation=site.activation)


@dataclass(frozen=True, kw_only=True)
class HiddenConfig(ActivatedConfig):
    """Settings of a feed-forward with a hidden layer.

    Attributes:
        expansion: hidden neurons over the width of a token (r).
    """

    expansion: float = 4

    def __post_init__(self):
        super().__post_init__()
        require_ratio(self.owner.name, self.expansion)


def hidden_width(who: str, expansion: float, site: Site) -> int:
    """Hidden neurons at a site. Raises `OperatorError` where none are left."""
    hidden = round(expansion * site.width)
    if hidden < 1:
        raise OperatorError(
            f"{who}: expansion {expansion} of width {site.width} leaves no neuron; {1 / site.width:.2g} leaves one."
        )
    return hidden


def is_narrower(hidden: int, site: Site) -> bool:
    """Whether some of the original's neurons must go."""
    return site.hidden is not None and hidden < site.hidden


def strongest(original: LinearPair, count: int) -> torch.Tensor:
    """The indices, in order, of the `count` neurons (all, if fewer) that move the output most.

    That is the size of a neuron's activation on data times the norm of its output weights; without data, the norm of
    its input weights stands for the former.
    """
    listens = original.up.float().norm(dim=1) if original.energy is None else original.energy.float().sqrt()
    strength = listens * original.down.float().norm(dim=0)
    return strength.topk(min(count, len(strength))).indices.sort().values


@torch.no_grad()
def copy_input(layer: nn.Linear, original: LinearPair, kept: torch.Tensor) -> None:
    """Give a layer's first neurons the input weights of those kept; the others keep random ones, to learn from."""
    layer.weight[: len(kept)] = original.up[kept]
    layer.bias.zero_()
    if original.up_bias is not None:
        layer.bias[: len(kept)] = original.up_bias[kept]


@torch.no_grad()
def copy_output(layer: nn.Linear, original: LinearPair, kept: torch.Tensor) -> None:
    """Give a layer's first inputs the output weights of the neurons kept; the others start silent."""
    layer.weight.zero_()
    layer.weight[:, : len(kept)] = original.down[:, kept]
    layer.bias.zero_()
    if original.down_bias is not None:
        layer.bias.copy_(original.down_bias)


def polynomials(original: LinearPair, degree: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every neuron of the original as a polynomial, the nearest over standard normal tokens, in float64.

    Returns:
        Directions [hidden, D] of length one and coefficients [degree + 1, hidden], in powers of direction * token.
    """
    up = original.up.double()
    mean = up.new_zeros(len(up)) if original.up_bias is None else original.up_bias.double()
    deviation = up.norm(dim=1).clamp(min=1e-6)  # of the neuron's input, when tokens are standard normal
    return up / deviation[:, None], hermite_coefficients(ACTIVATIONS[original.activation], mean, deviation, degree)
