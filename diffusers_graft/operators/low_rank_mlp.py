"""A feed-forward whose two linear layers are products of two thin ones: W = A B, of a given rank.

Paper: Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation, arXiv 1404.0736, section
3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..core.context import Context
from ..core.shapes import TokenTensor
from ..core.sites import FeedForwardSite
from ..errors import OperatorError
from .base import FeedForwardOperator, LinearPair
from .ops.activations import ACTIVATIONS
from .ops.feed_forward import ActivatedConfig, require_ungated


class LowRankMlp(FeedForwardOperator):
    """Two low-rank layers of the original's hidden size; cheaper than an expansion of 4 up to a rank of 0.8 D."""

    paper = "Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation, arXiv 1404.0736"
    start = "each linear layer is the best approximation of the original's of its rank; biases and activation stay"
    output_layer = "down"

    @dataclass(frozen=True, kw_only=True)
    class Config(ActivatedConfig):
        """Settings of the layers.

        Attributes:
            rank: of each layer: a whole number, or a share of the width of a token (above 0.0, up to 1.0).
            activation: diffusers' name; None means that of the replaced feed-forward.
        """

        rank: int | float = 0.5

        def __post_init__(self):
            super().__post_init__()
            is_count = type(self.rank) is int and self.rank > 0
            is_share = type(self.rank) is float and 0 < self.rank <= 1
            if not is_count and not is_share:
                raise OperatorError(
                    f"low_rank_mlp: rank is a whole number from 1, or a share of the width above 0.0, up to 1.0; "
                    f"got {self.rank!r}. Try 64 or 0.5."
                )

    def __init__(self, config: Config, site: FeedForwardSite):
        super().__init__(config, site)
        if site.hidden is None:
            raise OperatorError(f"low_rank_mlp: the hidden width of {site.path} is not known. Choose mlp there.")
        # No matrix has a higher rank than its shorter side.
        most = min(site.width, site.hidden)
        rank = config.rank
        if isinstance(rank, float):
            rank = min(most, max(1, round(rank * site.width)))
        if rank > most:
            raise OperatorError(
                f"low_rank_mlp: a layer at {site.path} has rank {most} at most; got {rank}. "
                "Lower it, or give a share of the width such as 0.5."
            )
        self.activation = ACTIVATIONS[config.activation_at(site)]
        self.up_in = nn.Linear(site.width, rank, bias=False)
        self.up = nn.Linear(rank, site.hidden)
        self.down_in = nn.Linear(site.hidden, rank, bias=False)
        self.down = nn.Linear(rank, site.width)

    def init_from(self, original: LinearPair) -> None:
        require_ungated(self.name, original)
        _factorise(original.up, original.up_bias, self.up_in, self.up)
        _factorise(original.down, original.down_bias, self.down_in, self.down)

    def forward(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        hidden = self.activation(self.up(self.up_in(hidden_states)))
        return self.down(self.down_in(hidden))

    def flops(self, tokens: int) -> int:
        return 4 * tokens * self.up.in_features * (self.site.width + self.site.hidden)


@torch.no_grad()
def _factorise(weight: torch.Tensor, bias: torch.Tensor | None, first: nn.Linear, second: nn.Linear) -> None:
    """Return a layer's truncated singular value decomposition (Eckart and Young), singular values shared evenly."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = first.out_features
    # Shared evenly, so that gradients of both factors are of one size.
    root = values.sqrt()[:rank]
    first.weight.copy_(root[:, None] * right[:rank])
    second.weight.copy_(left[:, :rank] * root)
    second.bias.zero_()
    if bias is not None:
        second.bias.copy_(bias)
