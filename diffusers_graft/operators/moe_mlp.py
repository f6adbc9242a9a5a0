"""Feed-forwards among which a router chooses a few for each token, and adds them weighted: a mixture of experts.

Papers: Outrageously Large Neural Networks, arXiv 1701.06538, Eq. 1 and 3 to 5 (top-k routing, without its noise);
Sparse Upcycling, arXiv 2212.05055 (experts that start from a dense feed-forward).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context
from ..core.shapes import TokenTensor
from ..core.sites import FeedForwardSite
from ..errors import OperatorError
from .base import FeedForwardOperator, LinearPair
from .ops.activations import ACTIVATIONS
from .ops.backends import autocast_device
from .ops.feed_forward import HiddenConfig, copy_input, fold_means, hidden_width, require_ungated, strongest
from .ops.settings import require_count


class MoeMlp(FeedForwardOperator):
    """A mixture of experts: `top_k` for each token, with weights that sum to one; experts share one output bias.

    Compiled, or without memory, all experts run on all tokens, to the same result: a graph cannot know how many tokens
    an expert gets. There is no loss that balances experts.
    """

    paper = "Outrageously Large Neural Networks, arXiv 1701.06538"
    start = (
        "the original's neurons dealt out to the experts in turn, going round, so that experts with room for all are "
        "copies of it and the start is the same function; where a token's experts miss some, the others are scaled "
        "for the least error under even routing, and the bias has the mean of what is missing"
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(HiddenConfig):
        """Settings of the experts.

        Attributes:
            expansion: hidden neurons of one expert over the width of a token.
            activation: diffusers' name; None means that of the replaced feed-forward.
            experts: how many there are, up to 256.
            top_k: how many a token runs through, from 2: a single expert would always weigh one, and give the router
                no gradient.
        """

        experts: int = 4
        top_k: int = 2

        def __post_init__(self):
            super().__post_init__()
            require_count("moe_mlp", "experts", self.experts, least=2, most=256, example=4)
            require_count("moe_mlp", "top_k", self.top_k, least=2, example=2)
            if self.top_k > self.experts:
                raise OperatorError(
                    f"moe_mlp: a token can run through {self.experts} experts at most; got top_k={self.top_k}."
                )

    def __init__(self, config: Config, site: FeedForwardSite):
        super().__init__(config, site)
        self.hidden = hidden_width(self.name, config.expansion, site)
        self.activation = ACTIVATIONS[config.activation_at(site)]
        self.router = nn.Linear(site.width, config.experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(site.width, self.hidden) for _ in range(config.experts))
        # Weights sum to one, so experts may share one bias.
        self.down = nn.ModuleList(nn.Linear(self.hidden, site.width, bias=False) for _ in range(config.experts))
        self.down_bias = nn.Parameter(torch.zeros(site.width))

    @torch.no_grad()
    def init_from(self, original: LinearPair) -> None:
        """Deal out the neurons, with a router so small that it sends tokens everywhere and weighs experts evenly."""
        require_ungated(self.name, original)
        self.router.weight.mul_(1e-3)
        chosen = strongest(original, self.config.experts * self.hidden)
        hands = self._deal(len(chosen))
        dealt = torch.cat(hands)
        none = torch.zeros(len(chosen), dtype=torch.float64)
        holders = none.index_add(0, dealt, torch.ones_like(dealt, dtype=torch.float64))  # `bincount` has no meta
        scale = _scale(holders, self.config.experts, self.config.top_k)
        # Scaled up, since tokens reach a part of a neuron's holders only.
        factors = scale.to(original.down)
        for up, down, hand in zip(self.up, self.down, hands, strict=True):
            assert isinstance(up, nn.Linear)
            assert isinstance(down, nn.Linear)
            copy_input(up, original.up, original.up_bias, chosen[hand])
            down.weight.zero_()
            down.weight[:, : len(hand)] = original.down[:, chosen[hand]] * factors[hand]
        self.down_bias.zero_()
        if original.down_bias is not None:
            self.down_bias.copy_(original.down_bias)
        if self.hidden < original.down.shape[1]:
            missing = torch.ones(original.down.shape[1], dtype=torch.float64, device=original.down.device)
            missing[chosen] -= (scale * holders / self.config.experts).to(missing.device)
            fold_means(self.down_bias, original, missing)

    def _deal(self, neurons: int) -> list[torch.Tensor]:
        """Return the indices of the neurons that each expert starts with, as many as it has room for."""
        room = min(self.hidden, neurons)
        return [torch.arange(first, first + room) % neurons for first in range(0, self.config.experts * room, room)]

    def forward(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        if torch.compiler.is_compiling() or hidden_states.is_meta:
            # How many tokens an expert gets is not known there.
            return self.reference(hidden_states, context)
        tokens = hidden_states.flatten(0, -2)
        weights, chosen = self._route(tokens)
        mixed = self.down_bias.expand_as(tokens).clone()
        for expert in range(self.config.experts):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            answer = self._expert(expert, tokens[rows]) * weights[rows, place, None]
            mixed = mixed.index_add(0, rows, answer.to(mixed.dtype))
        return mixed.view_as(hidden_states)

    def reference(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        """Compute by definition: every expert on every token, weighed with zero where it was not chosen."""
        weights, chosen = self._route(hidden_states)
        zeros = torch.zeros_like(hidden_states[..., :1]).repeat_interleave(self.config.experts, dim=-1)
        shares = zeros.scatter(-1, chosen, weights)
        answers = [self._expert(e, hidden_states) * shares[..., e, None] for e in range(self.config.experts)]
        return self.down_bias + sum(answers)

    def _route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each token's experts: weights that sum to one, and indices, [..., top_k]; float32 at least."""
        precise = torch.promote_types(tokens.dtype, torch.float32)
        # Rounded scores would send tokens to other experts.
        with torch.autocast(autocast_device(tokens), enabled=False):
            scores = F.linear(tokens.to(precise), self.router.weight.to(precise))
        best, chosen = scores.topk(self.config.top_k, dim=-1)
        return best.softmax(-1).to(tokens.dtype), chosen

    def _expert(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        return self.down[expert](self.activation(self.up[expert](tokens)))

    def flops(self, tokens: int) -> int:
        """Price the router, and of the experts those that are chosen, with their weights."""
        chosen = self.config.top_k * 4 * tokens * self.site.width * self.hidden
        return chosen + 2 * tokens * self.site.width * self.config.experts + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """Count the weighing of experts, which torch's counter does not see."""
        return 2 * tokens * self.site.width * self.config.top_k


def _scale(holders: torch.Tensor, experts: int, top_k: int) -> torch.Tensor:
    """Return the factor for a neuron that `holders` experts have, with the least expected squared error.

    Of `top_k` experts drawn at random, each of weight 1 / top_k, the number that hold it is hypergeometric.
    """
    share = holders / experts
    return 1 / (share + (1 - share) * (experts - top_k) / (top_k * (experts - 1)))
