"""A feed-forward of products instead of an activation: down(q * k * v), with q, k, v = conv(up(x)) along the features.

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, Table 4 (MLP Hyena-X, r = 2, K = 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context
from ..core.shapes import TokenTensor
from ..core.sites import FeedForwardSite
from .base import FeedForwardOperator, LinearPair
from .ops.feed_forward import hidden_width, is_narrower, linearize, polynomials, strongest
from .ops.settings import require_count, require_ratio

# A part of the product as a linear map of the token: weights [hidden, D] and biases [hidden].
Affine = tuple[torch.Tensor, torch.Tensor]


class HyenaMlp(FeedForwardOperator):
    """Products of convolved features, token by token: the convolution runs over q, k and v, the 3 r D features of one.

    The paper's code has one filter for each of 256 token positions, which fixes the length of a sequence. Here the
    positions share the sequence out evenly: where tokens are more, neighbours in raster order share a filter; where
    they are fewer, a token's is the mean of those that fall to it. With as many tokens as positions it is the paper's
    operator, with its 10,626,176 parameters at width 1152. The paper's table counts two gates and leaves the
    convolution out; `flops` counts both.
    """

    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"
    start = (
        "the strongest of the original's neurons, each with the parabola nearest to its activation over standard "
        "normal tokens, as q = 1 and k * v, or of a gated one the nearest line as k and its other factor as q; of the "
        "others the mean; convolutions pass what comes"
    )
    output_layer = "down"

    @dataclass(frozen=True, kw_only=True)
    class Config(FeedForwardOperator.Config):
        """Settings of the layers.

        Attributes:
            expansion: hidden neurons over the width of a token (r).
            kernel_size: taps of the convolution (K).
            positions: filters along the sequence; 1 is one for all tokens.
        """

        expansion: float = 2
        kernel_size: int = 4
        positions: int = 256

        def __post_init__(self):
            super().__post_init__()
            require_ratio("hyena_mlp", self.expansion)
            require_count("hyena_mlp", "kernel_size", self.kernel_size, example=4)
            require_count("hyena_mlp", "positions", self.positions, example=256)

    def __init__(self, config: Config, site: FeedForwardSite):
        super().__init__(config, site)
        self.hidden = hidden_width(self.name, config.expansion, site)
        self.uses_energy = is_narrower(self.hidden, site)
        self.up = nn.Linear(site.width, 3 * self.hidden)
        self.down = nn.Linear(self.hidden, site.width)
        self.convolution = nn.Conv1d(config.positions, config.positions, config.kernel_size, groups=config.positions)

    @torch.no_grad()
    def init_from(self, original: LinearPair) -> None:
        # The last tap alone: features pass as they are.
        self.convolution.weight.zero_()
        self.convolution.weight[:, :, -1] = 1.0
        nn.init.zeros_(self._filter_bias)
        chosen = strongest(original, self.hidden)
        if original.gate is None:
            constants = self._start_as_parabolas(original, chosen)
        else:
            constants = self._start_as_gates(original, chosen)
        self.down.weight.zero_()
        self.down.weight[:, : len(chosen)] = original.down[:, chosen]
        bias = original.down.double() @ constants
        if original.down_bias is not None:
            bias = bias + original.down_bias
        self.down.bias.copy_(bias)

    def _start_as_parabolas(self, original: LinearPair, chosen: torch.Tensor) -> torch.Tensor:
        """Write q = 1, k = slope + curve * v and v = direction * token; returns the constants left over, [hidden]."""
        direction, (constant, slope, curve) = polynomials(original, degree=2)
        constant += curve  # the mean of a parabola: all that is left of a neuron that is not chosen
        constant[chosen] -= curve[chosen]
        direction = direction[chosen]
        slope = slope[chosen]
        curve = curve[chosen]
        query = (torch.zeros_like(direction), torch.ones_like(slope))
        key = (curve[:, None] * direction, slope)
        value = (direction, torch.zeros_like(slope))
        self._write_products(query, key, value)
        return constant

    def _start_as_gates(self, original: LinearPair, chosen: torch.Tensor) -> torch.Tensor:
        """Write q = up(x), k = the gate's nearest line and v = 1; returns the constants left over, [hidden]."""
        direction, (constant, slope) = polynomials(original, degree=1)
        up = original.up.double()[chosen]
        up_bias = up.new_zeros(len(chosen))
        if original.up_bias is not None:
            up_bias = original.up_bias.double()[chosen]
        key = (slope[chosen, None] * direction[chosen], constant[chosen])
        value = (torch.zeros_like(up), torch.ones_like(up_bias))
        self._write_products((up, up_bias), key, value)
        _, constant = linearize(original)
        constant[chosen] = 0.0
        return constant

    def _write_products(self, query: Affine, key: Affine, value: Affine) -> None:
        """Write linear maps into the first neurons; the others keep their random ones, which `down` ignores."""
        parts = (query, key, value)
        for (weight, bias), rows, biases in zip(parts, self.up.weight.chunk(3), self.up.bias.chunk(3), strict=True):
            rows[: len(weight)] = weight
            biases[: len(bias)] = bias

    def forward(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        weight, bias = self._filters(hidden_states.shape[1])
        padded = F.pad(self.up(hidden_states), (self.config.kernel_size - 1, 0))
        query, key, value = F.conv1d(padded, weight[:, None], bias, groups=len(weight)).chunk(3, dim=-1)
        return self.down(query * key * value)

    def reference(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        """Compute by definition: the convolution tap by tap."""
        weight, bias = self._filters(hidden_states.shape[1])
        padded = F.pad(self.up(hidden_states), (self.config.kernel_size - 1, 0))
        taps = padded.unfold(-1, self.config.kernel_size, 1)
        query, key, value = ((taps * weight[:, None]).sum(-1) + bias[:, None]).chunk(3, dim=-1)
        return self.down(query * key * value)

    @property
    def _filter_bias(self) -> torch.Tensor:
        assert self.convolution.bias is not None
        return self.convolution.bias

    def _filters(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the filter [N, K] and bias [N] of every token."""
        # A token averages the filters of its positions; where tokens are more, several share one.
        filters = torch.cat([self.convolution.weight[:, 0], self._filter_bias[:, None]], dim=1)
        shared = F.adaptive_avg_pool1d(filters.T, tokens).T
        return shared[:, :-1], shared[:, -1]

    def flops(self, tokens: int) -> int:
        """Price the linear layers, the convolution and two gates."""
        convolution = 6 * self.config.kernel_size * tokens * self.hidden
        return 8 * tokens * self.site.width * self.hidden + convolution + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """Count the gates, which torch's counter does not see."""
        return 2 * tokens * self.hidden
