"""Softmax attention in which each query sees a box of keys around it: linear in tokens, exact, plain torch.

Queries are cut into tiles. A tile gathers the keys its queries may see (its halo), and one softmax call with a small mask
serves all tiles. Which keys a query sees is said for each axis of the grid by itself.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# An axis is its length and the settings of a rule; the rule lists, for each place, the places it sees.
Axis = tuple[int, ...]
Rule = Callable[..., list[range]]

# Up to here one masked softmax over all tokens beats gathering; the mask has at most 256 x 256 entries.
DENSE_TOKENS = 256


@dataclass(frozen=True)
class Tiling:
    """Tiles of a grid: tokens of each tile, tokens of its halo, which pairs may see each other, and the way back.

    Attributes:
        queries: [tiles, Q].
        keys: [tiles, K].
        mask: [tiles, 1, Q, K], true where a query sees a key.
        inverse: place of every token in the flattened tiles, [N].
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor
    inverse: torch.Tensor


def _cut(rule: Rule, axis: Axis, tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One axis: queries [tiles, T], halo [tiles, K], mask [tiles, T, K]. The last tile overlaps where T does not divide."""
    visible, length = rule(*axis), axis[0]
    tile = min(tile, length)
    starts = [min(start, length - tile) for start in range(0, length, tile)]
    seen = [visible[start : start + tile] for start in starts]
    lows = [min(row[0] for row in rows) for rows in seen]
    highs = [max(row[-1] for row in rows) for rows in seen]
    halo = max(high - low + 1 for low, high in zip(lows, highs, strict=True))
    lows = [min(low, length - halo) for low in lows]
    mask = torch.zeros(len(starts), tile, halo, dtype=torch.bool)
    for number, (low, rows) in enumerate(zip(lows, seen, strict=True)):
        for place, row in enumerate(rows):
            mask[number, place, row.start - low : row.stop - low : row.step] = True
    return torch.tensor(starts)[:, None] + torch.arange(tile), torch.tensor(lows)[:, None] + torch.arange(halo), mask


@functools.lru_cache(maxsize=64)
def _tiling(rule: Rule, axes: tuple[Axis, ...], tile: int, device: torch.device) -> Tiling:
    tokens = math.prod(axis[0] for axis in axes)
    sides = [tokens if tokens <= DENSE_TOKENS else tile] * len(axes)
    queries, keys, mask = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), None
    for axis, side in zip(axes, sides, strict=True):
        q, k, m = _cut(rule, axis, side)
        queries, keys = _outer(queries, q, axis[0]), _outer(keys, k, axis[0])
        mask = m if mask is None else _outer_mask(mask, m)
    inverse = torch.empty(tokens, dtype=torch.long)
    inverse[queries.flatten()] = torch.arange(queries.numel())
    return Tiling(queries.to(device), keys.to(device), mask[:, None].to(device), inverse.to(device))


def _outer(outer: torch.Tensor, inner: torch.Tensor, length: int) -> torch.Tensor:
    """Raster index of every pair of an outer and an inner place, tile by tile."""
    combined = outer[:, None, :, None] * length + inner[None, :, None, :]
    return combined.flatten(0, 1).flatten(1)


def _outer_mask(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    combined = outer[:, None, :, None, :, None] & inner[None, :, None, :, None, :]
    return combined.flatten(0, 1).flatten(3).flatten(1, 2)


@torch.compiler.assume_constant_result
def tiling(rule: Rule, axes: tuple[Axis, ...], tile: int, device: torch.device) -> Tiling:
    """The tiling of a grid, made once for each geometry and device."""
    return _tiling(rule, axes, tile, device)


def tiled_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule, axes: tuple[Axis, ...], *, tile: int,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Softmax attention of each query over the keys it sees: [B, H, N, E] in and out."""
    # Plain numbers again where compiled code holds symbols: a tiling belongs to one grid.
    axes = tuple(tuple(len([None] * setting) for setting in axis) for axis in axes)
    cut = tiling(rule, axes, tile, query.device)
    batch, heads, tokens, width = query.shape
    tiles = cut.queries.shape[0]
    if tiles == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=cut.mask, scale=scale)

    def gather(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        picked = tensor.index_select(2, index.flatten())
        return picked.view(batch * heads, tiles, -1, width).transpose(0, 1)

    mixed = F.scaled_dot_product_attention(
        gather(query, cut.queries), gather(key, cut.keys), gather(value, cut.keys), attn_mask=cut.mask, scale=scale
    )
    mixed = mixed.transpose(0, 1).reshape(batch, heads, -1, width)
    return mixed.index_select(2, cut.inverse)


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule, axes: tuple[Axis, ...], *, scale: float | None
) -> torch.Tensor:
    """The same by definition: one softmax over all tokens under a mask. The reference; quadratic."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        sees = torch.tensor([[j in seen for j in range(axis[0])] for seen in rule(*axis)])
        mask = (mask[:, None, :, None] & sees[None, :, None, :]).flatten(0, 1).flatten(1)
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask.to(query.device), float("-inf")).softmax(-1) @ value
