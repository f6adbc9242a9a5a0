"""Test-time training: keys and values train a small model in each head, queries ask it; non-causal, linear in tokens.

Paper: Linearizing Vision Transformer with Test-Time Training, arXiv 2605.02772 (the mixer of DiT5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context
from ..core.sites import Site
from ..errors import OperatorError
from .base import Mixer
from .ops.backends import COMPILED, WithBackends
from .ops.depthwise import ShortConvolution, heads_first, tokens_last


class Ttt(WithBackends, Mixer):
    """The inner model of a head is f(x) = SiLU(x W1) W2, with W1 and W2 in E x E that start each forward anew.

    A step of size one goes down the gradient of E^-1/2 / 2N sum ||f(k) - v||^2 over all tokens; then f(q) is the
    output. Keys are normalised over tokens first, and on a grid queries and keys pass 3 x 3 depthwise convolutions
    with a residual. Fast weights are kept in float32 whatever the inputs' precision.
    """

    backends = (COMPILED,)
    paper = "Linearizing Vision Transformer with Test-Time Training, arXiv 2605.02772"
    start = (
        "queries, keys, values and output projection keep their pretrained weights; convolutions start silent, the inner "
        "model small and random"
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the inner training.

        Attributes:
            steps: gradient steps of the inner model (the paper: 1).
            convolution: whether queries and keys pass convolutions on each frame's grid (the paper: they do).
            backend: `torch`, `auto` or `compiled` (by torch).
        """

        steps: int = 1
        convolution: bool = True

        def __post_init__(self):
            super().__post_init__()
            if type(self.steps) is not int or self.steps < 1:
                raise OperatorError(f"ttt: steps counts gradient steps from 1; got {self.steps!r}. The paper takes 1.")
            if type(self.convolution) is not bool:
                raise OperatorError(f"ttt: convolution is True or False; got {self.convolution!r}.")

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        shape = (site.heads, site.head_width, site.head_width)
        self.first, self.second = (nn.Parameter(0.02 * torch.randn(shape)) for _ in range(2))
        self.needs_grid, self.convolutions = config.convolution, nn.ModuleDict()
        if config.convolution:
            self.convolutions.update({name: ShortConvolution(site.inner_width, 3) for name in ("query", "key")})

    def init_from(self, original: nn.Module) -> None:
        for convolution in self.convolutions.values():
            convolution.set_constant(0.0)

    def in_torch(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        query, key = self._featurised(query, key, context, ShortConvolution.__call__)
        weights = self.first.to(query.dtype), self.second.to(query.dtype)
        for _ in range(self.config.steps):
            weights = trained(key, value.to(key.dtype), *weights)
        return inner_model(query, *weights).to(value.dtype)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """The definition: autograd's gradient of the inner loss; the convolutions tap by tap."""
        query, key = self._featurised(query, key, context, ShortConvolution.by_taps)
        # One set of weights a row: a sum over the batch then keeps the rows' gradients apart.
        weights = [weight.to(query.dtype).expand(len(query), -1, -1, -1) for weight in (self.first, self.second)]
        with torch.enable_grad():
            for _ in range(self.config.steps):
                weights = [weight.requires_grad_() for weight in weights]
                error = inner_model(key, *weights) - value.to(key.dtype)
                loss = error.square().sum() * (key.shape[-1] ** -0.5 / (2 * key.shape[-2]))
                descent = torch.autograd.grad(loss, weights, create_graph=True)
                weights = [weight - gradient for weight, gradient in zip(weights, descent, strict=True)]
        return inner_model(query, *weights).to(value.dtype)

    def _featurised(self, query: torch.Tensor, key: torch.Tensor, context: Context, convolve) -> list[torch.Tensor]:
        """Queries and keys in float32 at least, the keys of mean zero and variance below one in each channel."""
        precise = torch.promote_types(query.dtype, torch.float32)
        variance, mean = torch.var_mean(key.to(precise), dim=-2, correction=0, keepdim=True)
        parts = [query.to(precise), (key.to(precise) - mean) * (variance + 1).rsqrt()]
        if not self.config.convolution:
            return parts
        grid = context.require_grid(self.name, key.shape[-2])
        images = [tokens_last(part.to(key.dtype), grid.height, grid.width) for part in parts]
        convolved = [
            convolve(self.convolutions[name], image) for name, image in zip(("query", "key"), images, strict=True)
        ]
        return [part + heads_first(image, part).to(precise) for part, image in zip(parts, convolved, strict=True)]

    def flops(self, tokens: int) -> int:
        """Five products with E x E weights a step, two to ask, and the convolutions."""
        products = (10 * self.config.steps + 4) * tokens * self.site.inner_width * self.site.head_width
        convolutions = sum(convolution.flops(tokens) for convolution in self.convolutions.values())
        return products + convolutions + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """Elementwise work: the norm of keys, residuals, and in each step SiLU, its slope and the error."""
        return (8 + 2 * len(self.convolutions) + 12 * self.config.steps) * tokens * self.site.inner_width


def inner_model(tokens: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SiLU(x W1) W2 of [B, H, N, E] tokens, with weights [H, E, E] or [B, H, E, E]."""
    return F.silu(tokens @ first) @ second


def trained(
    key: torch.Tensor, value: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inner model's weights after one step, [B, H, E, E] each: the gradient of the inner loss in closed form.

    Args:
        key, value: [B, H, N, E].
        first, second: weights before it, [H, E, E] or [B, H, E, E].
    """
    hidden = key @ first
    gate = hidden.sigmoid()
    active = hidden * gate
    slope = gate + active * (1 - gate)
    error = (active @ second - value) * (key.shape[-1] ** -0.5 / key.shape[-2])
    first_gradient = key.transpose(-1, -2) @ (error @ second.transpose(-1, -2) * slope)
    return first - first_gradient, second - active.transpose(-1, -2) @ error
