"""SANA's feed-forward: a gated linear unit whose hidden neurons see their neighbours on the token grid.

Paper: SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, arXiv 2410.10629, section
3.2 (Mix-FFN; `GLUMBConv` in its code).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..core.context import Context, Grid
from ..core.shapes import TokenTensor
from ..core.sites import FeedForwardSite
from .base import FeedForwardOperator, LinearPair
from .ops.activations import ACTIVATIONS, Activation
from .ops.depthwise import Convolve, ShortConvolution
from .ops.feed_forward import (
    HiddenConfig,
    copy_input,
    copy_output,
    hidden_width,
    is_narrower,
    require_ungated,
    strongest,
)
from .ops.settings import require_odd


class MixFfn(FeedForwardOperator):
    """down(value * activation(gate)), with value and gate = depthwise(activation(up(x))); videos frame by frame.

    Its output layer has a bias, which SANA's has not, to take the original's.
    """

    needs_grid = True
    paper = "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, arXiv 2410.10629"
    start = (
        "values are the original's hidden neurons, unmixed, and gates start open (one), so that, where all neurons "
        "have room and with the original's activation, it is the same function; else the strongest are kept, and of "
        "the others the mean"
    )
    output_layer = "down"

    @dataclass(frozen=True, kw_only=True)
    class Config(HiddenConfig):
        """Settings of the layers.

        Attributes:
            expansion: hidden neurons over the width of a token; SANA's 2.5 costs about what a plain feed-forward of 4
                does.
            activation: of neurons and gates, diffusers' name, SANA's is `silu`; None means that of the replaced one.
            kernel: side of the convolution, odd.
        """

        kernel: int = 3

        def __post_init__(self):
            super().__post_init__()
            require_odd("mix_ffn", "kernel", self.kernel)

    def __init__(self, config: Config, site: FeedForwardSite):
        super().__init__(config, site)
        self.hidden = hidden_width(self.name, config.expansion, site)
        self.uses_energy = is_narrower(self.hidden, site)
        self.activation = ACTIVATIONS[config.activation_at(site)]
        self.up = nn.Linear(site.width, 2 * self.hidden)
        self.down = nn.Linear(self.hidden, site.width)
        self.convolution = ShortConvolution(2 * self.hidden, config.kernel)

    @torch.no_grad()
    def init_from(self, original: LinearPair) -> None:
        require_ungated(self.name, original)
        chosen = strongest(original, self.hidden)
        copy_input(self.up, original.up, original.up_bias, chosen)
        copy_output(self.down, original, chosen)
        # Values pass as they are, and gates are one whatever comes.
        self.convolution.set_identity()
        self.convolution.weight[self.hidden :] = 0.0
        self.convolution.bias[self.hidden :] = _open_gate(self.activation)

    def forward(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        return self._mix(hidden_states, context, ShortConvolution.__call__)

    def reference(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        """Compute by definition: the convolution tap by tap."""
        return self._mix(hidden_states, context, ShortConvolution.by_taps)

    def _mix(
        self,
        hidden_states: torch.Tensor,
        context: Context,
        convolve: Convolve,
    ) -> torch.Tensor:
        grid = context.require_grid(self.name, hidden_states.shape[1])
        hidden = self.activation(self.up(hidden_states))
        images = hidden.reshape(-1, grid.height, grid.width, 2 * self.hidden)
        value, gate = convolve(self.convolution, images).reshape(hidden.shape).chunk(2, dim=-1)
        return self.down(value * self.activation(gate))

    def receptive_field(self, token: int, grid: Grid) -> set[int]:
        reach = self.config.kernel // 2
        # Neighbours are those of the same frame.
        *_, y, x = grid.place_of(token)
        first = token - y * grid.width - x
        rows = range(max(0, y - reach), min(grid.height, y + reach + 1))
        columns = range(max(0, x - reach), min(grid.width, x + reach + 1))
        return {first + row * grid.width + column for row in rows for column in columns}

    def flops(self, tokens: int) -> int:
        """Price the linear layers, the convolution and the gates."""
        linear = 6 * tokens * self.site.width * self.hidden
        return linear + self.convolution.flops(tokens) + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """Count the gates, which torch's counter does not see."""
        return tokens * self.hidden


def _open_gate(activation: Activation) -> float:
    """Return the input where an activation is one, by bisection: all of `ACTIVATIONS` rise through one below two."""
    low = 0.0
    high = 2.0
    for _ in range(60):
        middle = (low + high) / 2
        if activation(torch.tensor(middle, dtype=torch.float64, device="cpu")) < 1:
            low = middle
        else:
            high = middle
    return high
