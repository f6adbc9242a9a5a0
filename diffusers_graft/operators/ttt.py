"""Test-time training: keys and values train a small model in each head, queries ask it; non-causal, linear in tokens.

Paper: Linearizing Vision Transformer with Test-Time Training, arXiv 2605.02772 (the mixer of DiT5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from .base import Mixer
from .ops.backends import COMPILED, WithBackends
from .ops.depthwise import Convolve, ShortConvolution, ShortConvolutions, heads_first, tokens_last
from .ops.settings import require_count, require_flag


class Ttt(WithBackends, Mixer):
    """The inner model of a head is f(x) = SiLU(x W1) W2, with W1 and W2 in E x E that start each forward anew.

    A step of size one goes down the gradient of E^-1/2 / 2N sum ||f(k) - v||^2 over all tokens; then f(q) is the
    output. Keys are normalised over tokens first, and on a grid queries and keys pass 3 x 3 depthwise convolutions
    with a residual. Fast weights are held in float32 whatever the inputs' precision.
    """

    backends = (COMPILED,)
    paper = "Linearizing Vision Transformer with Test-Time Training, arXiv 2605.02772"
    start = (
        "queries, keys, values and output projection keep their pretrained weights; convolutions start silent, the "
        "inner model small and random"
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the inner training.

        Attributes:
            steps: gradient steps of the inner model, up to 128 (the paper: 1).
            convolution: whether queries and keys pass convolutions on each frame's grid (the paper: they do).
            backend: `torch`, `auto` or `compiled` (by torch).
        """

        steps: int = 1
        convolution: bool = True

        def __post_init__(self):
            super().__post_init__()
            require_count("ttt", "steps", self.steps, most=128, example=1)
            require_flag("ttt", "convolution", self.convolution)

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        # Small, but not zero: the gradient of either layer is a multiple of the other.
        shape = (site.heads, site.head_width, site.head_width)
        self.first = nn.Parameter(0.02 * torch.randn(shape))
        self.second = nn.Parameter(0.02 * torch.randn(shape))
        self.needs_grid = config.convolution
        self.convolutions = ShortConvolutions()
        if config.convolution:
            self.convolutions["query"] = ShortConvolution(site.inner_width, 3)
            self.convolutions["key"] = ShortConvolution(site.inner_width, 3)

    def init_from(self, original: nn.Module) -> None:
        for convolution in self.convolutions.values():
            convolution.set_constant(0.0)

    def in_torch(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        query, key = self._featurise(query, key, context, ShortConvolution.__call__)
        first = self.first.to(query.dtype)
        second = self.second.to(query.dtype)
        for _ in range(self.config.steps):
            first, second = take_step(key, value.to(key.dtype), first, second)
        return inner_model(query, first, second).to(value.dtype)

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute by definition: autograd's gradient of the inner loss; the convolutions tap by tap."""
        query, key = self._featurise(query, key, context, ShortConvolution.by_taps)
        # One set of weights a row: a sum over the batch then holds the rows' gradients separate.
        weights = [weight.to(query.dtype).expand(len(query), -1, -1, -1) for weight in (self.first, self.second)]
        with torch.enable_grad():
            for _ in range(self.config.steps):
                weights = [weight.requires_grad_() for weight in weights]
                error = inner_model(key, *weights) - value.to(key.dtype)
                loss = error.square().sum() * (key.shape[-1] ** -0.5 / (2 * key.shape[-2]))
                descent = torch.autograd.grad(loss, weights, create_graph=True)
                weights = [weight - gradient for weight, gradient in zip(weights, descent, strict=True)]
        return inner_model(query, *weights).to(value.dtype)

    def _featurise(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        context: Context,
        convolve: Convolve,
    ) -> list[torch.Tensor]:
        """Return queries and keys in float32 at least; keys have mean zero and variance below one in each channel."""
        precise = torch.promote_types(query.dtype, torch.float32)
        variance, mean = torch.var_mean(key.to(precise), dim=-2, correction=0, keepdim=True)
        parts = [query.to(precise), (key.to(precise) - mean) * (variance + 1).rsqrt()]
        if not self.config.convolution:
            return parts
        grid = context.require_grid(self.name, key.shape[-2])
        images = [tokens_last(part.to(key.dtype), grid.height, grid.width) for part in parts]
        convolved = [
            convolve(convolution, image) for convolution, image in zip(self.convolutions.values(), images, strict=True)
        ]
        return [part + heads_first(image, part).to(precise) for part, image in zip(parts, convolved, strict=True)]

    def flops(self, tokens: int) -> int:
        """Price five products with E x E weights a step, two to ask, and the convolutions."""
        products = (10 * self.config.steps + 4) * tokens * self.site.inner_width * self.site.head_width
        convolutions = sum(convolution.flops(tokens) for convolution in self.convolutions.values())
        return products + convolutions + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """Count elementwise work: the norm of keys, residuals, and in each step SiLU, its slope and the error."""
        return (8 + 2 * len(self.convolutions) + 12 * self.config.steps) * tokens * self.site.inner_width


def inner_model(tokens: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Compute SiLU(x W1) W2 of [B, H, N, E] tokens, with weights [H, E, E] or [B, H, E, E]."""
    return F.silu(tokens @ first) @ second


def take_step(
    key: torch.Tensor, value: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the inner model's weights after one step, [B, H, E, E] each: the inner loss's gradient in closed form.

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
