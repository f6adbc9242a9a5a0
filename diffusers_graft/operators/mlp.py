"""A two-layer feed-forward of any width: down(activation(up(x))).

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, Table 4 (MLP, r = 3 and r = 6).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.context import Context
from ..core.shapes import TokenTensor
from ..core.sites import FeedForwardSite
from .base import FeedForwardOperator, LinearPair
from .ops.activations import ACTIVATIONS
from .ops.feed_forward import (
    HiddenConfig,
    copy_input,
    copy_output,
    hidden_width,
    is_narrower,
    require_ungated,
    strongest,
)


class Mlp(FeedForwardOperator):
    """Wider than the original it starts as the same function; narrower, with the original's strongest neurons."""

    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"
    start = (
        "keeps the original's neurons: all of them where there is room (then, with the original's activation, the "
        "same function), else the strongest, and of the others the mean"
    )
    output_layer = "down"

    @dataclass(frozen=True, kw_only=True)
    class Config(HiddenConfig):
        """Settings of the layers.

        Attributes:
            expansion: hidden neurons over the width of a token (r).
            activation: diffusers' name; None means that of the replaced feed-forward.
        """

    def __init__(self, config: Config, site: FeedForwardSite):
        super().__init__(config, site)
        hidden = hidden_width(self.name, config.expansion, site)
        # Data says which neurons matter, which is of use only where some must go.
        self.uses_energy = is_narrower(hidden, site)
        self.activation = ACTIVATIONS[config.activation_at(site)]
        self.up = nn.Linear(site.width, hidden)
        self.down = nn.Linear(hidden, site.width)

    def init_from(self, original: LinearPair) -> None:
        require_ungated(self.name, original)
        chosen = strongest(original, self.up.out_features)
        copy_input(self.up, original.up, original.up_bias, chosen)
        copy_output(self.down, original, chosen)

    def forward(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        return self.down(self.activation(self.up(hidden_states)))

    def flops(self, tokens: int) -> int:
        return 4 * tokens * self.site.width * self.up.out_features
