"""Parts that feed-forwards with a hidden layer share: settings, widths, and starts from the original's neurons."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from ...core.sites import FeedForwardSite, Site
from ...errors import OperatorError, UnknownNameError
from ..base import FeedForwardOperator, LinearPair
from .activations import ACTIVATIONS, GATED, gate_activation, hermite_coefficients
from .settings import require_ratio


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
        """List the names it accepts."""
        return ACTIVATIONS

    def check_activation(self, name: str) -> None:
        """Raise `OperatorError` for an activation that needs a gate, `UnknownNameError` for an unknown one."""
        if isinstance(name, str) and name in self.activations():
            return
        if isinstance(name, str) and name in GATED:
            raise OperatorError(
                f"{self.owner.name}: {name} is gated, which takes a second input layer that {self.owner.name} has "
                f"not. Choose gated_mlp, or name one of {', '.join(sorted(self.activations()))}."
            )
        raise UnknownNameError(f"activation of {self.owner.name}", name, self.activations())

    def resolved(self, site: Site) -> Self:
        # A site of another kind is refused by the operator, in words of its own.
        if self.activation is not None or not isinstance(site, FeedForwardSite):
            return self
        # Gated ones are refused below, in words of their own.
        if site.activation not in (*self.activations(), *GATED):
            found = f" ({site.activation})" if site.activation else ""
            raise OperatorError(
                f"{self.owner.name}: the activation of {site.path}{found} is not known. "
                f"Name one of {', '.join(sorted(self.activations()))}."
            )
        return replace(self, activation=site.activation)

    def activation_at(self, site: FeedForwardSite) -> str:
        """Return the name of the activation at a site. Raises as `resolved`."""
        activation = self.resolved(site).activation
        assert activation is not None
        return activation


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
    """Count the hidden neurons at a site. Raises `OperatorError` where none are left, or more than a tensor holds."""
    if expansion * site.width >= 2**31:
        raise OperatorError(
            f"{who}: expansion {expansion:g} of width {site.width} is more neurons than a tensor holds."
        )
    hidden = round(expansion * site.width)
    if hidden < 1:
        raise OperatorError(
            f"{who}: expansion {expansion} of width {site.width} leaves no neuron; {1 / site.width:.2g} leaves one."
        )
    return hidden


def is_narrower(hidden: int, site: FeedForwardSite) -> bool:
    """Return whether some of the original's neurons must go."""
    return site.hidden is not None and hidden < site.hidden


def require_ungated(who: str, original: LinearPair) -> None:
    """Raise `OperatorError` for a gated original, whose neurons one without a gate cannot hold."""
    if original.gate is not None:
        raise OperatorError(
            f"{who} has no gate, so nothing can start from a feed-forward of {original.activation}: "
            'choose gated_mlp, which has one, or init="random".'
        )


def strongest(original: LinearPair, count: int) -> torch.Tensor:
    """Choose the `count` neurons (all, if fewer) that move the output most; returns their indices in order.

    That is the size of a neuron's activation on data times the norm of its output weights; without data, the norm of
    its input weights takes the place of the former.
    """
    if original.energy is not None:
        activity = original.energy.float().sqrt()
    else:
        activity = original.up.float().norm(dim=1)
        if original.gate is not None:
            activity = activity * original.gate.float().norm(dim=1)
    strength = activity * original.down.float().norm(dim=0)
    chosen = strength.topk(min(count, len(strength))).indices
    # In the original's order, so that with room for all nothing is permuted and the start is exact.
    return chosen.sort().values


@torch.no_grad()
def copy_input(layer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None, chosen: torch.Tensor) -> None:
    """Give a layer's first neurons the input weights of those chosen; the others keep random ones, to learn from.

    Args:
        weight, bias: of the original's layer, [hidden, D] and [hidden].
        chosen: indices of neurons.
    """
    layer.weight[: len(chosen)] = weight[chosen]
    layer.bias.zero_()
    if bias is not None:
        layer.bias[: len(chosen)] = bias[chosen]


@torch.no_grad()
def copy_output(layer: nn.Linear, original: LinearPair, chosen: torch.Tensor) -> None:
    """Give a layer's first inputs the output weights of the chosen neurons; the others start silent.

    Of the neurons that are not chosen the mean stays, in the bias.
    """
    layer.weight.zero_()
    layer.weight[:, : len(chosen)] = original.down[:, chosen]
    layer.bias.zero_()
    if original.down_bias is not None:
        layer.bias.copy_(original.down_bias)
    neurons = original.down.shape[1]
    # Else nothing is missing, and the bias stays the original's to the last bit.
    if len(chosen) < neurons:
        missing = torch.ones(neurons, dtype=torch.float64, device=original.down.device)
        missing[chosen] = 0.0
        fold_means(layer.bias, original, missing)


@torch.no_grad()
def fold_means(bias: torch.Tensor, original: LinearPair, missing: torch.Tensor) -> None:
    """Add to an output bias the means of neurons as far as they are missing: on data, else on normal tokens.

    Args:
        bias: [D], changed in place.
        missing: share of each of the original's neurons that is not there, [hidden].
    """
    if original.mean is not None:
        means = original.mean.double()
    else:
        _, means = linearize(original)
    if original.energy is not None:
        # A mean is never larger than the root of the mean square, which is known of these neurons.
        most = original.energy.double().sqrt()
        means = means.clamp(-most, most)
    bias.add_((original.down.double() @ (missing * means)).to(bias))


def polynomials(original: LinearPair, degree: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate the activation of every neuron by the polynomial nearest over standard normal tokens, in float64.

    Returns:
        Directions [hidden, D] of length one and coefficients [degree + 1, hidden], in powers of direction * token. Of
        a gated original they are its gate's.
    """
    weight = original.up
    bias = original.up_bias
    if original.gate is not None:
        weight = original.gate
        bias = original.gate_bias
    # Float64, since starts are compared with the original's function to rounding.
    weight = weight.double()
    mean = _bias_or_zeros(bias, weight)
    deviation = weight.norm(dim=1).clamp(min=1e-6)  # of the neuron's input, when tokens are standard normal
    activation = gate_activation(original.activation)
    return weight / deviation[:, None], hermite_coefficients(activation, mean, deviation, degree)


def _bias_or_zeros(bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """Return the bias of a layer in float64, or zeros, [hidden]."""
    if bias is None:
        return weight.new_zeros(len(weight))
    return bias.double()


def linearize(original: LinearPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate every neuron by the linear map of the token nearest over standard normal tokens, in float64.

    Slopes are expected gradients (Stein's lemma), constants are the means of neurons.

    Returns:
        Slopes [hidden, D] and constants [hidden].
    """
    if original.gate is None:
        direction, (constant, slope) = polynomials(original, degree=1)
        return slope[:, None] * direction, constant
    # A gated neuron is h(z) (u . x + b), with z = direction . x: its factors share what u has along the direction.
    direction, (constant, slope, curve) = polynomials(original, degree=2)
    mean_gate = constant + curve
    up = original.up.double()
    up_bias = _bias_or_zeros(original.up_bias, up)
    shared = (up * direction).sum(dim=1)
    along = up_bias * slope + 2 * shared * curve
    return along[:, None] * direction + mean_gate[:, None] * up, up_bias * mean_gate + shared * slope
