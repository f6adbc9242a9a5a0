"""Softmax attention in which each query sees a box of keys around it: linear in tokens, exact, in plain torch.

HeadTensor are cut into tiles. A tile gathers the keys its queries may see (its halo), and one softmax call with a small
mask serves all tiles. Which keys a query sees is said for each axis of the grid by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .backends import compute_dtype, runs_in_pieces, specialize

# An axis is its length and the settings of a rule; the rule lists, for each place, the places it sees.
Axis = tuple[int, ...]
Rule = Callable[..., list[range]]

# Up to here one masked softmax over all tokens beats gathering; the mask has at most 256 x 256 entries.
DENSE_TOKENS = 256

# KeyTensor gathered at a time where nothing is kept for a backward pass.
GATHERED_TOKENS = 2048


@dataclass(frozen=True)
class Tiling:
    """Tiles of a grid: tokens of each tile, tokens of its halo, which pairs may see each other, and the way back.

    Attributes:
        queries: [tiles, Q].
        keys: [tiles, K]; in the end those that every query sees.
        mask: [tiles, 1, Q, K], true where a query sees a key; None where every query sees all.
        inverse: place of every token in the flattened tiles, [N].
        starts: first query and first key of each tile where both are runs of a sequence, else none.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None
    inverse: torch.Tensor
    starts: list[tuple[int, int]]


def _cut(rule: Rule, axis: Axis, tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """One axis: queries [tiles, T], halo [tiles, K], mask [tiles, T, K]; the last tile overlaps if T does not divide.

    And the first query and key of each tile, where both are runs.
    Where a rule sees every n-th place, so do tiles and halos: dilation costs nothing.
    """
    visible, length = rule(*axis), axis[0]
    step = visible[0].step if tile < length else 1
    tile = min(tile, length // step)
    groups = [range(remainder, length, step) for remainder in range(step)]
    tiles = [group[min(start, len(group) - tile) :][:tile] for group in groups for start in range(0, len(group), tile)]
    lows = [min(visible[place][0] for place in places) for places in tiles]
    highs = [max(visible[place][-1] for place in places) for places in tiles]
    halo = max((high - low) // step + 1 for low, high in zip(lows, highs, strict=True))
    lows = [min(low, length - halo) for low in lows] if step == 1 else lows
    mask = torch.zeros(len(tiles), tile, halo, dtype=torch.bool)
    for number, (low, places) in enumerate(zip(lows, tiles, strict=True)):
        for row, place in enumerate(places):
            seen = visible[place]
            first = (seen[0] - low) // step
            mask[number, row, first : (seen[-1] - low) // step + 1 : seen.step // step] = True
    # Past the end a dilated halo repeats the last place, which the mask hides.
    keys = (torch.tensor(lows)[:, None] + step * torch.arange(halo)).clamp(max=length - 1)
    starts = [(places[0], low) for places, low in zip(tiles, lows, strict=True)] if step == 1 else []
    return torch.tensor([list(places) for places in tiles]), keys, mask, starts


def _made(rule: Rule, axes: tuple[Axis, ...], tile: int, others: int, device: torch.device) -> Tiling:
    # A tiling outlives the mode it is made in: inference tensors, for one, could never be trained with.
    with torch.inference_mode(False), torch.device("cpu"):
        tokens = math.prod(axis[0] for axis in axes)
        see_all = all(len(row) == axis[0] for axis in axes for row in rule(*axis))
        sides = [tokens if see_all or tokens <= DENSE_TOKENS else tile] * len(axes)
        queries, keys = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
        mask = torch.ones(1, 1, 1, dtype=torch.bool)
        for axis, side in zip(axes, sides, strict=True):
            q, k, m, starts = _cut(rule, axis, side)
            queries, keys, mask = _outer(queries, q, axis[0]), _outer(keys, k, axis[0]), _outer_mask(mask, m)
        inverse = torch.empty(tokens, dtype=torch.long)
        inverse[queries.flatten()] = torch.arange(queries.numel())
        keys = torch.cat([keys, torch.arange(tokens, tokens + others).expand(len(keys), -1)], dim=1)
        mask = None if see_all else F.pad(mask[:, None], (0, others), value=True).to(device)
        starts = starts if len(axes) == 1 else []
        return Tiling(queries.to(device), keys.to(device), mask, inverse.to(device), starts)


_kept = functools.lru_cache(maxsize=64)(_made)


def _outer(outer: torch.Tensor, inner: torch.Tensor, length: int) -> torch.Tensor:
    """Raster index of every pair of an outer and an inner place, tile by tile."""
    combined = outer[:, None, :, None] * length + inner[None, :, None, :]
    return combined.flatten(0, 1).flatten(1)


def _outer_mask(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    combined = outer[:, None, :, None, :, None] & inner[None, :, None, :, None, :]
    return combined.flatten(0, 1).flatten(3).flatten(1, 2)


@torch.compiler.assume_constant_result
def tiling(rule: Rule, axes: tuple[Axis, ...], tile: int, others: int, device: torch.device) -> Tiling:
    """The tiling of a grid, made once for each geometry and device; all queries see `others` keys besides, after the
    grid's.
    """
    return _kept(rule, axes, tile, others, device)


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    axes: tuple[Axis, ...],
    *,
    tile: int,
    scale: float | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of each query over the keys it sees: [B, H, N, E], twice [B, H, M, E], and [B, H, N, E] out.

    KeyTensor beyond the queries' own, M - N of them, are seen by every query.

    Args:
        mask: as `scaled_dot_product_attention` takes it, broadcastable to [B, H, N, M]; each tile gathers its part. A
            query all of whose keys are hidden gives zeros.
    """
    # A tiling belongs to one grid.
    axes = tuple(tuple(specialize(setting) for setting in axis) for axis in axes)
    # Tensors that only pretend, as in FakeTensorMode, need a tiling of their kind; it must not be kept for real ones.
    others = specialize(key.shape[2] - query.shape[2])
    tile = max(tile, round((others / 4) ** (1 / len(axes))))  # each tile gathers the others anew: fewer tiles then
    cut = (tiling if type(query) is torch.Tensor else _made)(rule, axes, tile, others, query.device)
    # Code compiled for changing sizes knows the `size()` of such constants, and not their `shape`.
    tiles, mask = cut.queries.size(0), mask if mask is None else mask[(None,) * (4 - mask.dim())]
    if tiles == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=_both(cut.mask, mask), scale=scale)
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if cut.starts and runs_in_pieces(query):
        return _in_turns(query, key, value, cut, others, scale, mask)
    # Whole tokens [B, N, H * E] are gathered fastest, and without gradients a few tiles at a time, which stay in
    # cache.
    parts = tuple(part.transpose(1, 2).flatten(2) for part in (query, key, value))
    step = tiles if whole else max(1, GATHERED_TOKENS // cut.keys.size(1))
    some = [slice(start, start + step) for start in range(0, tiles, step)]
    mixed = [_mixed(parts, cut, few, query.shape[1], scale, mask) for few in some]
    mixed = (torch.cat(mixed, dim=1) if len(mixed) > 1 else mixed[0]).index_select(1, cut.inverse)
    return mixed.unflatten(2, (query.shape[1], -1)).transpose(1, 2)


def _in_turns(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cut: Tiling,
    others: int,
    scale: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Tile by tile on the tensors as they lie. (A backward pass would fill a whole tensor for each slice.)"""
    queries, keys, tokens = cut.queries.shape[1], cut.keys.shape[1] - others, query.shape[2]

    def near(part: torch.Tensor, dim: int, low: int) -> torch.Tensor:
        own = part.narrow(dim, low, keys)
        return torch.cat([own, part.narrow(dim, tokens, others)], dim) if others else own

    mixed = value.new_empty(query.shape[0], query.shape[2], value.shape[1], value.shape[3], dtype=compute_dtype(value))
    for (first, low), window in zip(cut.starts, cut.mask[:, 0], strict=True):
        own = slice(first, first + queries)
        parts = query[:, :, own], near(key, 2, low), near(value, 2, low)
        visible = _both(
            window, None if mask is None else near(mask[:, :, own if mask.shape[2] > 1 else slice(None)], 3, low)
        )
        mixed[:, own] = F.scaled_dot_product_attention(*parts, attn_mask=visible, scale=scale).transpose(1, 2)
    return mixed.transpose(1, 2)


def _mixed(
    parts: tuple[torch.Tensor, ...],
    cut: Tiling,
    some: slice,
    heads: int,
    scale: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Some tiles, mixed: [B, tiles * Q, H * E]."""
    queries, keys, window = cut.queries[some], cut.keys[some], cut.mask[some]
    batch, tiles = len(parts[0]), len(queries)
    gathered = (
        part.index_select(1, index.flatten())
        .view(batch * tiles, index.size(1), heads, part.shape[2] // heads)
        .transpose(1, 2)
        for part, index in zip(parts, (queries, keys, keys), strict=True)
    )
    visible = _both(window.repeat(batch, 1, 1, 1), None if mask is None else _gathered(mask, queries, keys, batch))
    mixed = F.scaled_dot_product_attention(*gathered, attn_mask=visible, scale=scale)
    return mixed.transpose(1, 2).reshape(batch, queries.numel(), parts[2].shape[2])


def _gathered(mask: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, batch: int) -> torch.Tensor:
    """What tiles see of a mask: [B or 1, H or 1, N or 1, N] -> [B * tiles, H or 1, Q or 1, K]."""
    rows = queries if mask.shape[2] > 1 else torch.zeros_like(queries[:, :1])
    part = mask[:, :, rows[:, :, None], keys[:, None]].transpose(1, 2)
    return part.expand(batch, *part.shape[1:]).flatten(0, 1)


def _both(window: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """What a window and a mask leave to be seen; additive where the mask is."""
    if window is None or mask is None:
        return mask if window is None else window
    return mask & window if mask.dtype == torch.bool else mask.masked_fill(~window, float("-inf"))


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    axes: tuple[Axis, ...],
    *,
    scale: float | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same by definition: one softmax over all tokens under a mask. The reference; quadratic."""
    window = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        sees = torch.tensor([[j in seen for j in range(axis[0])] for seen in rule(*axis)])
        window = (window[:, None, :, None] & sees[None, :, None, :]).flatten(0, 1).flatten(1)
    window = F.pad(window, (0, key.shape[2] - query.shape[2]), value=True)
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    hidden = ~window.to(query.device)
    if mask is not None:
        hidden = hidden | (~mask if mask.dtype == torch.bool else mask == float("-inf"))
        scores = scores if mask.dtype == torch.bool else scores + mask
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(hidden, 0) @ value  # zeros, and not undefined, where all is hidden
