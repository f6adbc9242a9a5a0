"""Kernel attention without softmax: phi(q) (phi(k)^T v) / phi(q) sum phi(k), non-causal, linear in tokens.

Papers: Transformers are RNNs, arXiv 2006.16236, Eq. 6 (elu + 1); The Hedgehog and the Porcupine, arXiv 2402.04347
(learnable softmax features); LiT, arXiv 2501.12976 (a depthwise convolution of the values, fewer and wider heads);
Attention Surgery, arXiv 2509.24899 (powers of a learned map); SANA-Video, arXiv 2509.24695 (features before the rotary
embedding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import OperatorError, UnknownNameError
from .base import Mixer, rare
from .ops.backends import COMPILED, WithBackends, runs_in_pieces
from .ops.depthwise import ShortConvolution, heads_first, tokens_last
from .ops.features import LEAST, features_of, split_pairs, turn_as
from .ops.masks import key_weights
from .ops.settings import require_count, require_odd
from .self_attention import regroup_heads, require_divided, require_mask_of_heads

FEATURE_MAPS = ("elu", "relu", "softmax", "mlp", "polynomial")
PAIRS = ("neighbours", "halves")

# Tokens at a time where nothing is saved for a backward pass: as many as stay in cache.
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
            feature_map: `elu` (elu + 1), `relu`, `softmax` (a learnable map per head, then softmax of x and -x),
                `mlp` (the same behind a learnable map of two layers) or `polynomial` (two powers of such maps, the
                first of them cut off at zero). Learnable maps start as the identity.
            value_conv: side of a depthwise convolution of the values on each frame's grid, added to the output and
                starting at zero; odd, or 0 for none.
            heads: how many heads share the width; None means as many as in the replaced attention (LiT: fewer).
            rotary: takes the features of queries and keys before the model's rotary embedding, and turns them by it
                where they meet the values, not in the normaliser, which stays positive (SANA-Video). It says which
                channels the embedding turns together: `neighbours` (as in Flux and Wan) or `halves`. None takes them
                behind it.
            backend: `torch`, `auto` or `compiled` (by torch).
        """

        feature_map: str = "elu"
        value_conv: int = 0
        heads: int | None = rare(None)
        rotary: str | None = rare(None)

        def __post_init__(self):
            super().__post_init__()
            if self.feature_map not in FEATURE_MAPS:
                raise UnknownNameError("feature map of linear_attention", self.feature_map, FEATURE_MAPS)
            if type(self.value_conv) is not int or self.value_conv != 0:
                require_odd("linear_attention", "value_conv", self.value_conv)
            if self.heads is not None:
                require_count("linear_attention", "heads", self.heads, example=4)
            if self.rotary is not None and self.rotary not in PAIRS:
                raise UnknownNameError("rotary of linear_attention", self.rotary, PAIRS)
            if self.rotary is not None and self.feature_map not in ("elu", "relu"):
                raise OperatorError(
                    f"linear_attention: rotary turns features that are channels, and {self.feature_map!r} has others. "
                    'Choose feature_map="relu" or "elu".'
                )

        @property
        def papers(self) -> tuple[str, ...]:
            papers = [*super().papers]
            if self.feature_map in ("softmax", "mlp"):
                papers.append("The Hedgehog and the Porcupine, arXiv 2402.04347")
            if self.feature_map == "polynomial":
                papers.append("Attention Surgery, arXiv 2509.24899")
            if self.heads is not None or self.value_conv:
                papers.append("LiT, arXiv 2501.12976")
            if self.rotary is not None:
                papers.append("SANA-Video, arXiv 2509.24695")
            return tuple(papers)

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        self.feature_weight = None
        self.feature_first = None
        self.feature_second = None
        self.value_convolution = None
        self.before_rotary = config.rotary is not None
        self._knows_pairs = False  # until the first forward has shown that the embedding turns the pairs of `rotary`
        if self.before_rotary and site.head_width % 2:
            raise OperatorError(
                f"linear_attention: rotary turns pairs of channels, and heads of {site.path} have {site.head_width}. "
                "Leave it out."
            )
        self.heads = config.heads or site.heads
        require_divided(self.name, self.heads, site)
        width = site.inner_width // self.heads
        # The identity, so that features start as those of queries and keys as they are.
        identity = torch.eye(width).expand(2, self.heads, -1, -1)  # of queries and of keys
        if config.feature_map == "softmax":
            self.feature_weight = nn.Parameter(identity.clone())
        if config.feature_map in ("mlp", "polynomial"):
            # Two layers that are the identity: x = relu(x) - relu(-x).
            powers = 2 if config.feature_map == "polynomial" else 1
            self.feature_first = nn.Parameter(torch.cat([identity, -identity], dim=-1))
            self.feature_second = nn.Parameter(torch.cat([identity, -identity], dim=-2).repeat(1, 1, 1, powers))
        if config.value_conv:
            self._add_value_convolution(config.value_conv, site)

    def _add_value_convolution(self, size: int, site: AttentionSite) -> None:
        # Keys of another sequence have no place on the grid.
        if site.kind != "self_attention":
            raise OperatorError(
                f"linear_attention: value_conv needs values that lie on the queries' grid; {site.path} is "
                f"{site.address}. Set value_conv=0."
            )
        self.needs_grid = True
        self.value_convolution = ShortConvolution(site.inner_width, size)
        self.value_convolution.set_constant(0.0)

    def in_torch(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        precise = torch.promote_types(query.dtype, torch.float32)
        turned = self._turned_features(query, key, context)
        query, key, value = (regroup_heads(part, self.heads) for part in (query, key, value))
        visible = None
        if context.mask is not None:
            require_mask_of_heads(self.name, context.mask, self.heads)
            visible = key_weights(self.name, context.mask, key.shape[2], precise)
        if turned:
            mixed = _mix_turned(turned, value.to(precise), visible)
        else:
            state, weight = self._write(key, value.to(precise), visible)
            mixed = self._read(query, state, weight)
        mixed = regroup_heads(mixed.to(value.dtype), self.site.heads)
        if self.value_convolution is None:
            return mixed
        image = self._value_image(value, visible, context)
        return mixed + heads_first(self.value_convolution(image), mixed)

    def require_rotary(self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> None:
        assert self.config.rotary is not None
        if not self._knows_pairs:
            require_pairs(self.site.path, self.config.rotary, before, after)
            self._knows_pairs = True

    def _turned_features(self, query: torch.Tensor, key: torch.Tensor, context: Context) -> list[torch.Tensor]:
        """Return features of queries and keys before rotary embeddings, and then both as these turn them; or none."""
        if self.config.rotary is None:
            return []
        assert context.unrotated is not None
        precise = torch.promote_types(query.dtype, torch.float32)
        found = []
        turned = []
        for before, after in zip(context.unrotated, (query, key), strict=True):
            features = features_of(self.config.feature_map, before.to(precise))
            found.append(features)
            turned.append(turn_as(features, before.to(precise), after.to(precise), self.config.rotary))
        return [regroup_heads(part, self.heads) for part in (*found, *turned)]

    def _write(
        self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return v^T phi(k), [B, H, E, features], and the sum of phi(k), [B, H, features, 1]."""
        state: Any = 0
        weight: Any = 0
        keys = _split_tokens(key)
        factors = (None,) * len(keys) if visible is None else _split_tokens(visible)
        for some_keys, some_values, factor in zip(keys, _split_tokens(value), factors, strict=True):
            features = self._features(some_keys, 1).to(value.dtype)
            if factor is not None:
                features = features * factor
            state = state + some_values.transpose(-1, -2) @ features
            weight = weight + features.sum(-2)
        return state, weight[..., None]

    def _read(self, query: torch.Tensor, state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Read the state for each query, [B, H, N, E]."""
        pieces = _split_tokens(query)
        if len(pieces) == 1:
            return torch.mul(*self._find(query, state, weight))
        # Pieces are written where they belong: to join them would take the memory twice.
        mixed = state.new_empty(*query.shape[:3], state.shape[-2])
        for queries, place in zip(pieces, mixed.split(TOGETHER, dim=-2), strict=True):
            torch.mul(*self._find(queries, state, weight), out=place)
        return mixed

    def _find(
        self, query: torch.Tensor, state: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return phi(q) phi(k)^T v, and its normaliser, [B, H, N, 1]."""
        features = self._features(query, 0).to(state.dtype)
        return features @ state.transpose(-1, -2), (features @ weight).clamp(min=LEAST).reciprocal()

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute by definition: all N x M weights, normalised row by row; the convolution tap by tap."""
        turned = self._turned_features(query, key, context)
        query, key, value = (regroup_heads(part, self.heads) for part in (query, key, value))
        if turned:
            shares = turned[0] @ turned[1].transpose(-1, -2)
            weights = turned[2] @ turned[3].transpose(-1, -2)
        else:
            shares = self._features(query, 0) @ self._features(key, 1).transpose(-1, -2)
            weights = shares
        visible = None
        if context.mask is not None:
            visible = key_weights(self.name, context.mask, key.shape[2], key.dtype)
            shares = shares * visible.transpose(-1, -2)
            weights = weights * visible.transpose(-1, -2)
        mixed = (weights / shares.sum(-1, keepdim=True).clamp(min=LEAST)) @ value
        mixed = regroup_heads(mixed, self.site.heads)
        if self.value_convolution is None:
            return mixed
        image = self._value_image(value, visible, context)
        return mixed + heads_first(self.value_convolution.by_taps(image), mixed)

    def _value_image(self, value: torch.Tensor, visible: torch.Tensor | None, context: Context) -> torch.Tensor:
        """Lay [B, H, N, E] out as [B * frames, height, width, D], hidden tokens as zeros."""
        grid = context.require_grid(self.name, value.shape[2])
        if visible is not None:
            # A bias weighs keys in their sum alone; what it hides is gone.
            value = value * (visible > 0)
        return tokens_last(value, grid.height, grid.width)

    def _features(self, tensor: torch.Tensor, which: int) -> torch.Tensor:
        if self.feature_first is not None:
            assert self.feature_second is not None
            mapped = F.relu(tensor @ self.feature_first[which]) @ self.feature_second[which]
        elif self.feature_weight is not None:
            mapped = tensor @ self.feature_weight[which]
        else:
            return features_of(self.config.feature_map, tensor)
        if self.config.feature_map == "polynomial":
            # An odd power may be negative, and a weight may not.
            once, twice = mapped.chunk(2, dim=-1)
            return torch.cat([features_of("relu", once), twice.square()], dim=-1)
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)

    def flops(self, tokens: int) -> int:
        """Price two products with the [features, E] state, one with its normaliser, the maps and the convolution."""
        width = self.site.inner_width // self.heads
        features = width
        operations = 0
        if self.feature_weight is not None:
            features = 2 * width
            operations += 4 * tokens * self.site.inner_width * width
        if self.feature_first is not None:
            features = 2 * width
            powers = 2 if self.config.feature_map == "polynomial" else 1
            operations += 8 * (1 + powers) * tokens * self.site.inner_width * width
        if self.value_convolution is not None:
            operations += self.value_convolution.flops(tokens)
        return operations + tokens * self.heads * (4 * features * width + 2 * features)


@torch.no_grad()
def require_pairs(path: str, pairs: str, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> None:
    """Raise `OperatorError` where an embedding that turned tensors did not turn these pairs of channels."""
    for one, other in zip(before, after, strict=True):
        sizes = [torch.hypot(*split_pairs(part.float(), pairs)) for part in (one, other)]
        if not torch.allclose(*sizes, rtol=0.02, atol=0.02 * float(sizes[0].mean())):
            raise OperatorError(
                f"linear_attention: rotary={pairs!r} was asked for, and the embedding of {path} turns other pairs of "
                f"channels. Try rotary={next(name for name in PAIRS if name != pairs)!r}, or leave it out."
            )


def _mix_turned(features: list[torch.Tensor], value: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Read values through turned features, normalised by those that are not, [B, H, N, E]."""
    query, key, turned_query, turned_key = features
    if visible is not None:
        key = key * visible
        turned_key = turned_key * visible
    weight = query @ key.sum(-2)[..., None]
    return (turned_query @ (turned_key.transpose(-1, -2) @ value)) / weight.clamp(min=LEAST)


def _split_tokens(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split along the last axis but one where that is faster; else return the tensor alone."""
    if runs_in_pieces(tensor):
        return tensor.split(TOGETHER, dim=-2)
    return (tensor,)
