"""One linear map in place of a feed-forward: the lower control, and what is left when a feed-forward is pruned.

Its start is the statistical linearisation of the original, with slopes from Stein's lemma (Bussgang 1952).
"""

from __future__ import annotations

import torch
from torch import nn

from ..core.context import Context
from ..core.shapes import TokenTensor
from ..core.sites import FeedForwardSite
from .base import FeedForwardOperator, LinearPair, OperatorConfig
from .ops.feed_forward import linearize


class LinearMlp(FeedForwardOperator):
    """An eighth of the cost of a feed-forward of expansion 4.

    The start is as good as tokens are standard normal; on the testbed model, whose tokens are not, it is no closer to
    the original than silence is. `dg.closed_form` finds the best linear map for data.
    """

    start = "the linear map nearest to the original over standard normal tokens, roughly what a norm leaves"
    output_layer = "linear"

    def __init__(self, config: OperatorConfig, site: FeedForwardSite):
        super().__init__(config, site)
        self.linear = nn.Linear(site.width, site.width)

    @torch.no_grad()
    def init_from(self, original: LinearPair) -> None:
        slopes, constants = linearize(original)
        down = original.down.double()
        self.linear.weight.copy_(down @ slopes)
        bias = down @ constants
        if original.down_bias is not None:
            bias = bias + original.down_bias
        self.linear.bias.copy_(bias)

    def forward(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        return self.linear(hidden_states)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.site.width**2
