"""A feed-forward whose hidden neurons are gated: down(activation(gate(x)) * up(x)).

Paper: GLU Variants Improve Transformer, arXiv 2002.05202, Eq. 6.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from ..core.context import Context
from ..core.sites import Site
from .base import FeedForwardOperator, LinearPair
from .ops.activations import ACTIVATIONS, GATED
from .ops.feed_forward import HiddenConfig, copy_input, copy_output, hidden_width, is_narrower, strongest

GATES = {**ACTIVATIONS, "sigmoid": torch.sigmoid}


class GatedMlp(FeedForwardOperator):
    """The original's input layer becomes the gate, its activation with it; what the gate multiplies starts as one."""

    paper = "GLU Variants Improve Transformer, arXiv 2002.05202"
    start = (
        "the original's input layer and activation become the gate, of a constant one, so that, where all neurons have "
        "room, it is the same function; else the strongest are kept"
    )
    output_layer = "down"

    @dataclass(frozen=True, kw_only=True)
    class Config(HiddenConfig):
        """Settings of the layers.

        Attributes:
            expansion: hidden neurons over the width of a token; 8 / 3 costs what an ungated feed-forward of 4 does.
            activation: of the gate: diffusers' name, `sigmoid`, or that of a unit (`glu`, `reglu`, `geglu`, `swiglu`);
                None means that of the replaced feed-forward.
        """

        @classmethod
        def activations(cls) -> Collection[str]:
            return GATES.keys() | GATED.keys()

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        hidden = hidden_width(self.name, config.expansion, site)
        self.uses_energy = is_narrower(hidden, site)
        activation = config.resolved(site).activation
        self.activation = GATES[GATED.get(activation, activation)]
        self.gate, self.up = nn.Linear(site.width, hidden), nn.Linear(site.width, hidden)
        self.down = nn.Linear(hidden, site.width)

    @torch.no_grad()
    def init_from(self, original: LinearPair) -> None:
        kept = strongest(original, self.up.out_features)
        copy_input(self.gate, original, kept)
        copy_output(self.down, original, kept)
        self.up.weight[: len(kept)] = 0.0
        self.up.bias.fill_(1.0)

    def forward(self, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
        return self.down(self.activation(self.gate(hidden_states)) * self.up(hidden_states))

    def flops(self, tokens: int) -> int:
        """Three linear layers and the gates."""
        return 6 * tokens * self.site.width * self.up.out_features + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """The gates, which torch's counter does not see."""
        return tokens * self.up.out_features
