"""SANA's feed-forward: a gated linear unit whose hidden neurons look at their neighbours on the token grid.

Paper: SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, arXiv 2410.10629, section
3.2 (Mix-FFN; `GLUMBConv` in its code).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..core.context import Context, Grid
from ..core.sites import Site
from ..errors import OperatorError
from .base import FeedForwardOperator, LinearPair
from .ops.activations import ACTIVATIONS, Activation
from .ops.depthwise import ShortConvolution
from .ops.feed_forward import HiddenConfig, copy_input, copy_output, hidden_width, is_narrower, strongest


class MixFfn(FeedForwardOperator):
    """down(value * activation(gate)), with value and gate = depthwise(activation(up(x))); a video is mixed frame by
    frame.

    Its output layer has a bias, which SANA's has not, to take the original's.
    """

    needs_grid = True
    paper = "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, arXiv 2410.10629"
    start = (
        "values are the original's hidden neurons, unmixed, and gates start open (one), so that, where all neurons have "
        "room and with the original's activation, it is the same function; else the strongest are kept"
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
            if type(self.kernel) is not int or self.kernel < 1 or self.kernel % 2 == 0:
                raise OperatorError(f"mix_ffn: kernel is an odd count of tokens; got {self.kernel!r}. Try 3 or 5.")

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        self.hidden = hidden_width(self.name, config.expansion, site)
        self.uses_energy = is_narrower(self.hidden, site)
        self.activation = ACTIVATIONS[config.resolved(site).activation]
        self.up, self.down = nn.Linear(site.width, 2 * self.hidden), nn.Linear(self.hidden, site.width)
        self.convolution = ShortConvolution(2 * self.hidden, config.kernel)

    @torch.no_grad()
    def init_from(self, original: LinearPair) -> None:
        kept = strongest(original, self.hidden)
        copy_input(self.up, original, kept)
        copy_output(self.down, original, kept)
        self.convolution.set_identity()
        self.convolution.weight[self.hidden :] = 0.0
        self.convolution.bias[self.hidden :] = _opening(self.activation)

    def forward(self, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
        return self._mixed(hidden_states, context, ShortConvolution.__call__)

    def reference(self, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
        """The definition: the convolution tap by tap."""
        return self._mixed(hidden_states, context, ShortConvolution.by_taps)

    def _mixed(self, hidden_states: torch.Tensor, context: Context, convolve) -> torch.Tensor:
        grid = context.require_grid(self.name, hidden_states.shape[1])
        hidden = self.activation(self.up(hidden_states))
        images = hidden.reshape(-1, grid.height, grid.width, 2 * self.hidden)
        value, gate = convolve(self.convolution, images).reshape(hidden.shape).chunk(2, dim=-1)
        return self.down(value * self.activation(gate))

    def receptive_field(self, token: int, grid: Grid) -> set[int]:
        reach, (*frame, y, x) = self.config.kernel // 2, grid.place_of(token)
        first = frame[0] * grid.height * grid.width if frame else 0
        rows = range(max(0, y - reach), min(grid.height, y + reach + 1))
        columns = range(max(0, x - reach), min(grid.width, x + reach + 1))
        return {first + row * grid.width + column for row in rows for column in columns}

    def flops(self, tokens: int) -> int:
        """The linear layers, the convolution and the gates."""
        linear = 6 * tokens * self.site.width * self.hidden
        return linear + self.convolution.flops(tokens) + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """The gates, which torch's counter does not see."""
        return tokens * self.hidden


def _opening(activation: Activation) -> float:
    """The input that an activation makes one of, by bisection: all of `ACTIVATIONS` rise through one below two."""
    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        below = activation(torch.tensor(middle, dtype=torch.float64, device="cpu")) < 1
        low, high = (middle, high) if below else (low, middle)
    return high
