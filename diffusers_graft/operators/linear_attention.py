"""Kernel attention without softmax: phi(q) (phi(k)^T v) / phi(q) sum phi(k), non-causal, linear in tokens.

Papers: Transformers are RNNs, arXiv 2006.16236, Eq. 6 (elu + 1); The Hedgehog and the Porcupine, arXiv 2402.04347
(learnable softmax features); LiT, arXiv 2501.12976 (a depthwise convolution of the values).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context
from ..core.sites import Site
from ..errors import OperatorError, UnknownNameError
from .base import Mixer
from .ops.backends import COMPILED, WithBackends, runs_in_pieces
from .ops.depthwise import ShortConvolution, heads_first, tokens_last

FEATURE_MAPS = ("elu", "relu", "softmax")

# Least sum of weights: below what features of e^-40 make, and its inverse square, which gradients take, is a float32.
LEAST = 1e-18

# Tokens at a time where nothing is kept for a backward pass: as many as stay in cache.
TOGETHER = 128


class LinearAttention(WithBackends, Mixer):
    """Sums in float32 whatever the inputs' precision; a mask may hide keys, the same for every query."""

    kinds = ("self_attention", "cross_attention")
    honours_mask = True
    backends = (COMPILED,)
    paper = "Transformers are RNNs, arXiv 2006.16236"

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the kernel.

        Attributes:
            feature_map: `elu` (elu + 1), `relu`, or `softmax` (a learnable map per head, then softmax of x and -x).
            value_conv: side of a depthwise convolution of the values on each frame's grid, added to the output and
                starting at zero; odd, or 0 for none.
            backend: `torch`, `auto` or `compiled` (by torch).
        """

        feature_map: str = "elu"
        value_conv: int = 0

        def __post_init__(self):
            super().__post_init__()
            if self.feature_map not in FEATURE_MAPS:
                raise UnknownNameError("feature map of linear_attention", self.feature_map, FEATURE_MAPS)
            side = self.value_conv
            if type(side) is not int or side < 0 or (side and side % 2 == 0):
                raise OperatorError(
                    f"linear_attention: value_conv is an odd count of tokens, or 0 for none; got {side!r}. Try 3 or 5."
                )

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        self.feature_weight, self.value_convolution = None, None
        if config.feature_map == "softmax":
            one = torch.eye(site.head_width).expand(2, site.heads, -1, -1)  # of queries and of keys
            self.feature_weight = nn.Parameter(one.clone())
        if config.value_conv:
            self._add_value_convolution(config.value_conv, site)

    def _add_value_convolution(self, size: int, site: Site) -> None:
        if site.kind != "self_attention":
            raise OperatorError(
                f"linear_attention: value_conv needs values that lie on the queries' grid; {site.path} is "
                f"{site.address}. Set value_conv=0."
            )
        self.needs_grid, self.value_convolution = True, ShortConvolution(site.inner_width, size)
        self.value_convolution.set_constant(0.0)

    def in_torch(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        precise = torch.promote_types(query.dtype, torch.float32)
        visible = None if context.mask is None else key_weights(context.mask, key.shape[2], precise)
        mixed = self._read(query, *self._written(key, value.to(precise), visible)).to(value.dtype)
        if self.value_convolution is None:
            return mixed
        return mixed + heads_first(self.value_convolution(self._value_image(value, visible, context)), value)

    def _written(
        self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """v^T phi(k), [B, H, E, features], and the sum of phi(k), [B, H, features, 1]."""
        state = weight = 0
        keys, values = _pieces(key), _pieces(value)
        factors = (None,) * len(keys) if visible is None else _pieces(visible)
        for key, value, factor in zip(keys, values, factors, strict=True):
            features = self._features(key, 1).to(value.dtype)
            features = features if factor is None else features * factor
            state = state + value.transpose(-1, -2) @ features
            weight = weight + features.sum(-2)
        return state, weight[..., None]

    def _read(self, query: torch.Tensor, state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[B, H, N, E]: what each query finds in the state."""
        pieces = _pieces(query)
        if len(pieces) == 1:
            return torch.mul(*self._found(query, state, weight))
        mixed = state.new_empty(*query.shape[:3], state.shape[-2])
        for queries, place in zip(pieces, mixed.split(TOGETHER, dim=-2), strict=True):
            torch.mul(*self._found(queries, state, weight), out=place)
        return mixed

    def _found(
        self, query: torch.Tensor, state: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """phi(q) phi(k)^T v, and what normalises it, [B, H, N, 1]."""
        features = self._features(query, 0).to(state.dtype)
        return features @ state.transpose(-1, -2), (features @ weight).clamp(min=LEAST).reciprocal()

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """The definition: all N x M weights, normalised row by row; the convolution tap by tap."""
        weights = self._features(query, 0) @ self._features(key, 1).transpose(-1, -2)
        visible = None if context.mask is None else key_weights(context.mask, key.shape[2], key.dtype)
        weights = weights if visible is None else weights * visible.transpose(-1, -2)
        mixed = (weights / weights.sum(-1, keepdim=True).clamp(min=LEAST)) @ value
        if self.value_convolution is None:
            return mixed
        return mixed + heads_first(self.value_convolution.by_taps(self._value_image(value, visible, context)), value)

    def _value_image(self, value: torch.Tensor, visible: torch.Tensor | None, context: Context) -> torch.Tensor:
        """[B, H, N, E] -> [B * frames, height, width, D], hidden tokens as zeros."""
        grid = context.require_grid(self.name, value.shape[2])
        value = value if visible is None else value * visible.to(value.dtype)
        return tokens_last(value, grid.height, grid.width)

    def _features(self, tensor: torch.Tensor, which: int) -> torch.Tensor:
        if self.config.feature_map == "elu":
            return EluPlusOne.apply(tensor) if torch.is_grad_enabled() else EluPlusOne.forward(tensor)
        if self.config.feature_map == "relu":
            return F.relu(tensor) + 1e-3
        mapped = tensor @ self.feature_weight[which]
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)

    def flops(self, tokens: int) -> int:
        """Two products with the [features, E] state, one with its normaliser; the maps and the convolution, if any."""
        width, inner = self.site.head_width, self.site.inner_width
        learnable = self.feature_weight is not None
        features = 2 * width if learnable else width
        maps = 4 * tokens * inner * width if learnable else 0
        convolution = 0 if self.value_convolution is None else self.value_convolution.flops(tokens)
        return maps + convolution + tokens * self.site.heads * (4 * features * width + 2 * features)


class EluPlusOne(torch.autograd.Function):
    """elu(x) + 1 without the slow part of elu, exp(x) - 1.

    Its slope, exp(x) up to zero and 1 from there on, is read off the result, which products need anyway: nothing more
    is kept.
    """

    @staticmethod
    def forward(tensor: torch.Tensor) -> torch.Tensor:
        above = F.relu(tensor)
        return (tensor - above).exp().add_(above)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (output,) = ctx.saved_tensors
        return grad * output.clamp(max=1)


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the tokens, the last axis but one."""
    return tensor.split(TOGETHER, dim=-2) if runs_in_pieces(tensor) else (tensor,)


def key_weights(mask: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """A mask as a factor on so many keys, [B, 1 or H, M, 1]: 0 or 1, or of an additive mask its exponential, as in
    softmax.

    Keys are summed once for all queries. Raises `OperatorError` where a mask differs from query to query, and where
    compiled code, which cannot look, is given one that may.
    """
    row = mask[..., :1, :]
    if mask.shape[-2] > 1 and (torch.compiler.is_compiling() or not torch.equal(mask, row.expand_as(mask))):
        raise OperatorError(
            f"linear_attention was given an attention mask of shape {tuple(mask.shape)}: it sums keys once for all "
            "queries, so a mask must hide the same keys from each. Give it as [..., 1, keys], or keep softmax here."
        )
    row = row.transpose(-1, -2).expand(*row.shape[:-2], keys, 1).to(dtype)
    return row if mask.dtype == torch.bool else row.exp()
