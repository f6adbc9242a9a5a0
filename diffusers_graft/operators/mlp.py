"""A two-layer feed-forward of any width: down(activation(up(x))).

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, Table 4 (MLP, r = 3 and r = 6).
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import OperatorError, UnknownNameError
from ..site import Context, Site
from .base import FeedForwardOperator, LinearPair

# By diffusers' names.
ACTIVATIONS = {
    "gelu": F.gelu, "gelu-approximate": partial(F.gelu, approximate="tanh"), "silu": F.silu, "linear-silu": F.silu,
    "relu": F.relu,
}  # fmt: skip

# They need a second input layer for the gate.
GATED = ("geglu", "geglu-approximate", "swiglu")


class Mlp(FeedForwardOperator):
    """Wider than the original it starts as the same function; narrower, with the original's strongest neurons."""

    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"
    start = (
        "keeps the original's neurons: all of them where there is room (then, with the original's activation, the same "
        "function), else the strongest"
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(FeedForwardOperator.Config):
        """Settings of the layers.

        Attributes:
            expansion: hidden neurons over the width of a token (r).
            activation: diffusers' name; None means that of the replaced feed-forward.
        """

        expansion: float = 4
        activation: str | None = None

        def __post_init__(self):
            super().__post_init__()
            number = isinstance(self.expansion, int | float) and not isinstance(self.expansion, bool)
            if not number or not 0 < self.expansion < math.inf:
                raise OperatorError(f"mlp: expansion is a positive ratio; got {self.expansion!r}. Try 3, 4 or 6.")
            if self.activation in GATED:
                raise OperatorError(
                    f"mlp: {self.activation} is gated, which takes a second input layer that mlp has not. "
                    f"Name one of {', '.join(sorted(ACTIVATIONS))}."
                )
            if self.activation is not None and self.activation not in ACTIVATIONS:
                raise UnknownNameError("activation of mlp", self.activation, ACTIVATIONS)

        def resolved(self, site: Site) -> Mlp.Config:
            if self.activation is not None:
                return self
            if site.activation is None:
                raise OperatorError(
                    f"mlp: the activation of {site.path} is not known. Name one of {', '.join(sorted(ACTIVATIONS))}."
                )
            return replace(self, activation=site.activation)

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        hidden = round(config.expansion * site.width)
        if hidden < 1:
            raise OperatorError(
                f"mlp: expansion {config.expansion} of width {site.width} leaves no neuron; "
                f"{1 / site.width:.2g} leaves one."
            )
        self.activation = ACTIVATIONS[config.resolved(site).activation]
        self.up, self.down = nn.Linear(site.width, hidden), nn.Linear(hidden, site.width)

    @torch.no_grad()
    def init_from(self, original: LinearPair) -> None:
        kept = self._kept(original)
        self.down.weight.zero_()  # new neurons start silent, with random inputs to learn from
        self.up.weight[: len(kept)], self.down.weight[:, : len(kept)] = original.up[kept], original.down[:, kept]
        self.up.bias.zero_()
        if original.up_bias is not None:
            self.up.bias[: len(kept)] = original.up_bias[kept]
        self.down.bias.zero_()
        if original.down_bias is not None:
            self.down.bias.copy_(original.down_bias)

    def _kept(self, original: LinearPair) -> torch.Tensor:
        """The original's neurons that fit, by the product of the norms of their input and output weights, in order."""
        strength = original.up.float().norm(dim=1) * original.down.float().norm(dim=0)
        count = min(self.up.out_features, len(strength))
        return strength.topk(count).indices.sort().values

    def forward(self, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
        return self.down(self.activation(self.up(hidden_states)))

    def flops(self, tokens: int) -> int:
        return 4 * tokens * self.site.width * self.up.out_features
