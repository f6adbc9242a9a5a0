"""A feed-forward whose hidden neurons are gated: down(activation(gate(x)) * up(x)).

Paper: GLU Variants Improve Transformer, arXiv 2002.05202, Eq. 6.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from ..core.context import Context
from ..core.shapes import TokenTensor
from ..core.sites import FeedForwardSite
from .base import FeedForwardOperator, LinearPair
from .ops.activations import GATED, GATES, gate_activation
from .ops.feed_forward import HiddenConfig, copy_input, copy_output, hidden_width, is_narrower, strongest


class GatedMlp(FeedForwardOperator):
    """A gated original keeps its layers; of another the input layer becomes the gate, of what starts as one."""

    paper = "GLU Variants Improve Transformer, arXiv 2002.05202"
    start = (
        "a gated original's layers, or the input layer and activation of another as the gate of a constant one, so "
        "that, where all neurons have room, it is the same function; else the strongest are kept, and of the others "
        "the mean"
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

    def __init__(self, config: Config, site: FeedForwardSite):
        super().__init__(config, site)
        hidden = hidden_width(self.name, config.expansion, site)
        self.uses_energy = is_narrower(hidden, site)
        self.activation = gate_activation(config.activation_at(site))
        self.gate = nn.Linear(site.width, hidden)
        self.up = nn.Linear(site.width, hidden)
        self.down = nn.Linear(hidden, site.width)

    @torch.no_grad()
    def init_from(self, original: LinearPair) -> None:
        chosen = strongest(original, self.up.out_features)
        copy_output(self.down, original, chosen)
        if original.gate is not None:
            copy_input(self.gate, original.gate, original.gate_bias, chosen)
            copy_input(self.up, original.up, original.up_bias, chosen)
            return
        copy_input(self.gate, original.up, original.up_bias, chosen)
        # A constant one: new neurons keep random weights there, to learn from.
        self.up.weight[: len(chosen)] = 0.0
        self.up.bias.fill_(1.0)

    def forward(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        return self.down(self.activation(self.gate(hidden_states)) * self.up(hidden_states))

    def flops(self, tokens: int) -> int:
        """Price three linear layers and the gates."""
        return 6 * tokens * self.site.width * self.up.out_features + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """Count the gates, which torch's counter does not see."""
        return tokens * self.up.out_features
