"""Softmax attention in which each query sees a box of keys around it: linear in tokens, exact, in plain torch.

Queries are cut into tiles. A tile gathers the keys its queries may see (its halo), and one softmax call with a small
mask serves all tiles. Which keys a query sees is said for each axis of the grid by itself.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .backends import compute_dtype, runs_in_pieces, specialize

# An axis is its length and the settings of a rule; the rule lists, for each place, the places it sees.
Axis = tuple[int, ...]
Rule = Callable[..., list[range]]

# What queries see besides is not said axis by axis: a function of the lengths of the axes, raster indices of queries
# and of keys, and settings, which come behind it. It asks how far apart two tokens are, not where they are.
Pairs = tuple[Any, ...]

# First place and length along each axis.
Box = tuple[tuple[int, int], ...]

# Up to here one masked softmax over all tokens beats gathering; the mask has at most 256 x 256 entries.
DENSE_TOKENS = 256

# Numbers of keys gathered at a time where nothing is saved for a backward pass: as many as stay in cache.
GATHERED = 2**18

# Channels of all heads, and samples, from which on a tile is work enough to be one call.
WIDE = 512


@dataclass(frozen=True)
class Tiling:
    """Tiles of a grid: tokens of each tile, tokens of its halo, which pairs may see each other, and the way back.

    Attributes:
        queries: [tiles, Q].
        keys: [tiles, K]; in the end those that every query sees.
        mask: [tiles, 1, Q, K], true where a query sees a key; None where every query sees all.
        inverse: place of every token in the flattened tiles, [N].
        boxes: those of the queries of each tile, and those of its halo, where both are runs along every axis; else
            none.
        rows: first tile and number of tiles of each row of tiles along the last axis whose halos lie as far apart as
            the tiles, under one mask; none without boxes.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None
    inverse: torch.Tensor
    boxes: tuple[list[Box], list[Box]]
    rows: list[tuple[int, int]]


@dataclass(frozen=True)
class _Cut:
    """The tiles of one axis.

    Attributes:
        queries: [tiles, T].
        keys: the halo of each tile, [tiles, K].
        mask: [tiles, T, K].
        starts: first query and first key of each tile where both are runs, else none.
        windows: what each query of a tile sees, counted from the first key of its halo.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor
    starts: list[tuple[int, int]]
    windows: list[list[tuple[int, int]]]


def _cut(rule: Rule, axis: Axis, tile: int) -> _Cut:
    """Cut one axis into tiles; the last tile overlaps if T does not divide.

    Where a rule sees every n-th place, so do tiles and halos: dilation costs nothing.
    """
    visible = rule(*axis)
    length = axis[0]
    step = visible[0].step if tile < length else 1
    tile = min(tile, length // step)
    tiles = []
    for remainder in range(step):
        group = range(remainder, length, step)
        tiles += [group[min(start, len(group) - tile) :][:tile] for start in range(0, len(group), tile)]
    lows = []
    highs = []
    for places in tiles:
        lows.append(min(visible[place][0] for place in places))
        highs.append(max(visible[place][-1] for place in places))
    # Halos are of one size, so that one softmax call serves all tiles.
    halo = max((high - low) // step + 1 for low, high in zip(lows, highs, strict=True))
    if step == 1:
        lows = [min(low, length - halo) for low in lows]
    mask = torch.zeros(len(tiles), tile, halo, dtype=torch.bool)
    windows = []
    for number, (low, places) in enumerate(zip(lows, tiles, strict=True)):
        for row, place in enumerate(places):
            seen = visible[place]
            first = (seen[0] - low) // step
            mask[number, row, first : (seen[-1] - low) // step + 1 : seen.step // step] = True
        windows.append([(visible[place][0] - low, visible[place][-1] - low) for place in places])
    # Past the end a dilated halo repeats the last place, which the mask hides.
    keys = (torch.tensor(lows)[:, None] + step * torch.arange(halo)).clamp(max=length - 1)
    starts = []
    if step == 1:
        starts = [(places[0], low) for places, low in zip(tiles, lows, strict=True)]
    return _Cut(torch.tensor([list(places) for places in tiles]), keys, mask, starts, windows)


def _make_tiling(
    rule: Rule, axes: tuple[Axis, ...], tile: int, others: int, device: torch.device, pairs: Pairs | None = None
) -> Tiling:
    # A tiling outlives the mode it is made in: inference tensors, for one, could never be trained with.
    with torch.inference_mode(False), torch.device("cpu"):
        tokens = math.prod(axis[0] for axis in axes)
        sees_all = pairs is None and all(len(row) == axis[0] for axis in axes for row in rule(*axis))
        sees_more = any(len(row) > 1 for axis in axes for row in rule(*axis))
        if sees_all or tokens <= DENSE_TOKENS:
            tile = tokens
        queries = torch.zeros(1, 1, dtype=torch.long)
        keys = torch.zeros(1, 1, dtype=torch.long)
        mask = torch.ones(1, 1, 1, dtype=torch.bool)
        runs = []
        rows: list[tuple[int, int]] = []
        for axis in axes:
            side = tile
            if sees_more and tile < tokens and all(len(row) == 1 for row in rule(*axis)):
                # Frames that see themselves alone have nothing in common to gather.
                side = 1
            cut = _cut(rule, axis, side)
            along = _find_rows(cut)
            # In the end those along the last axis, once for each tile of the axes before it.
            rows = [
                (outer * len(cut.queries) + first, count) for outer in range(len(queries)) for first, count in along
            ]
            queries = outer_places(queries, cut.queries, axis[0])
            keys = outer_places(keys, cut.keys, axis[0])
            mask = _outer_mask(mask, cut.mask)
            runs.append((cut.starts, cut.queries.size(1), cut.keys.size(1)))
        inverse = torch.empty(tokens, dtype=torch.long)
        inverse[queries.flatten()] = torch.arange(queries.numel())
        if pairs is not None:
            mask = mask & _sees_pair(pairs, axes, queries[:, :, None], keys[:, None])
        keys = torch.cat([keys, torch.arange(tokens, tokens + others).expand(len(keys), -1)], dim=1)
        mask = F.pad(mask[:, None], (0, others), value=True)
        # Kernels are faster without a mask than with one that hides nothing.
        visible = None if sees_all else mask.to(device)
        return Tiling(queries.to(device), keys.to(device), visible, inverse.to(device), _boxes_of(runs), rows)


def _sees_pair(pairs: Pairs, axes: tuple[Axis, ...], queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    sees, *settings = pairs
    return sees(tuple(axis[0] for axis in axes), queries, keys, *settings)


def ragged_tiling(
    tiles: list[tuple[list[int], list[int]]],
    sees: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    others: int,
    device: torch.device,
) -> Tiling:
    """Make a tiling whose tiles see different numbers of keys.

    Args:
        tiles: queries, as many of each tile, and the keys that any of them sees; together the queries are all tokens.
        sees: whether a query sees a key, of raster indices that broadcast.
        others: keys behind the grid's, which every query sees.
    """
    # As in `_make_tiling`: a tiling outlives the mode it is made in.
    with torch.inference_mode(False), torch.device("cpu"):
        most = max(len(keys) for _, keys in tiles)
        tokens = 1 + max(max(places) for places, _ in tiles)
        queries = torch.tensor([places for places, _ in tiles])
        # Where there are fewer keys, one of them is repeated, and hidden.
        keys = torch.tensor([places + places[:1] * (most - len(places)) for _, places in tiles])
        counts = torch.tensor([len(places) for _, places in tiles])
        is_there = torch.arange(most) < counts[:, None]
        mask = sees(queries[:, :, None], keys[:, None]) & is_there[:, None]
        inverse = torch.empty(tokens, dtype=torch.long)
        inverse[queries.flatten()] = torch.arange(queries.numel())
        keys = torch.cat([keys, torch.arange(tokens, tokens + others).expand(len(keys), -1)], dim=1)
        mask = F.pad(mask[:, None], (0, others), value=True)
        return Tiling(queries.to(device), keys.to(device), mask.to(device), inverse.to(device), ([], []), [])


def _boxes_of(runs: list[tuple[list[tuple[int, int]], int, int]]) -> tuple[list[Box], list[Box]]:
    """Return the boxes of queries and of halos, in the order of tiles.

    Args:
        runs: for each axis the first query and first key of its tiles, and how many there are of each.
    """
    queries = [[(first, count) for first, _ in starts] for starts, count, _ in runs]
    halos = [[(low, count) for _, low in starts] for starts, _, count in runs]
    return list(itertools.product(*queries)), list(itertools.product(*halos))


def _find_rows(cut: _Cut) -> list[tuple[int, int]]:
    """Return first tile and number of tiles of each row of tiles that differ in nothing but their place in it."""
    side = cut.queries.size(1)
    rows: list[tuple[int, int]] = []
    for number, (query, low) in enumerate(cut.starts):
        is_moved = number > 0 and cut.starts[number - 1] == (query - side, low - side)
        if is_moved and cut.windows[number] == cut.windows[number - 1]:
            first, count = rows[-1]
            rows[-1] = (first, count + 1)
        else:
            rows.append((number, 1))
    return rows


_cached_tiling = functools.lru_cache(maxsize=64)(_make_tiling)


def outer_places(outer: torch.Tensor, inner: torch.Tensor, length: int) -> torch.Tensor:
    """Return raster indices of all pairs of an outer and an inner place, tile by tile."""
    combined = outer[:, None, :, None] * length + inner[None, :, None, :]
    return combined.flatten(0, 1).flatten(1)


def _outer_mask(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    combined = outer[:, None, :, None, :, None] & inner[None, :, None, :, None, :]
    return combined.flatten(0, 1).flatten(3).flatten(1, 2)


@torch.compiler.assume_constant_result
def tiling(
    rule: Rule, axes: tuple[Axis, ...], tile: int, others: int, device: torch.device, pairs: Pairs | None = None
) -> Tiling:
    """Return the tiling of a grid, made once for each geometry and device.

    All queries see `others` keys besides, after the grid's.
    """
    return _cached_tiling(rule, axes, tile, others, device, pairs)


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
    pairs: Pairs | None = None,
) -> torch.Tensor:
    """Compute softmax attention of each query over the keys it sees: [B, H, N, E] and twice [B, H, M, E].

    Keys beyond the queries' own, M - N of them, are seen by every query.

    Args:
        rule, axes: which places of each axis a place sees.
        tile: places of a tile along each axis.
        scale: factor on query-key products; None means 1 / sqrt(E).
        mask: as `scaled_dot_product_attention` takes it, broadcastable to [B, H, N, M]; each tile gathers its part. A
            query all of whose keys are hidden gives zeros.
        pairs: which of the pairs that `rule` lets see each other do.

    Returns: [B, H, N, E].
    """
    # A tiling belongs to one grid.
    axes = tuple(tuple(map(specialize, axis)) for axis in axes)
    others = specialize(key.shape[2] - query.shape[2])
    tile = max(tile, round((others / 4) ** (1 / len(axes))))  # each tile gathers the others anew: fewer tiles then
    # Tensors that only pretend, as in FakeTensorMode, need a tiling of their kind, not to be cached for real ones.
    make = tiling if type(query) is torch.Tensor else _make_tiling
    cut = make(rule, axes, tile, others, query.device, pairs)
    return attend_in_tiles(query, key, value, cut, tuple(axis[0] for axis in axes), scale=scale, mask=mask)


def attend_in_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cut: Tiling,
    lengths: tuple[int, ...],
    *,
    scale: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Compute what `tiled_attention` does for tiles that are there already.

    Args:
        lengths: of the axes of the grid.
    """
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    # Code compiled for changing sizes knows the `size()` of such constants, and not their `shape`.
    tiles = cut.queries.size(0)
    if tiles == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=_combine(cut.mask, mask), scale=scale)
    is_wide = len(lengths) == 1 or len(query) * query.shape[1] * query.shape[3] >= WIDE
    if is_wide and cut.boxes[0] and runs_in_pieces(query):
        return _row_by_row(query, key, value, cut, lengths, scale, mask)
    # Tokens of all heads [B, N, H * E] are gathered fastest, and without gradients a few tiles at a time, which stay
    # in cache.
    parts = tuple(part.transpose(1, 2).flatten(2) for part in (query, key, value))
    step = tiles
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        step = max(1, GATHERED // (cut.keys.size(1) * parts[0].shape[2]))
    pieces = [slice(start, start + step) for start in range(0, tiles, step)]
    mixed = [_mix_tiles(parts, cut, piece, query.shape[1], scale, mask) for piece in pieces]
    joined = mixed[0]
    if len(mixed) > 1:
        joined = torch.cat(mixed, dim=1)
    in_order = joined.index_select(1, cut.inverse)
    return in_order.unflatten(2, (query.shape[1], -1)).transpose(1, 2)


def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cut: Tiling,
    lengths: tuple[int, ...],
    scale: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attend within one row of tiles after the other, whose tokens and halos are boxes of the grid, cut out as slices.

    Along a sequence halos are views of the keys that overlap, so that nothing is gathered.
    """
    # Without gradients alone: a backward pass would fill a tensor of all tokens for each tile.
    assert cut.mask is not None
    batch, heads, _, width = value.shape
    tokens = query.shape[2]
    # Tokens before heads, so that a row of a box is one piece of memory.
    images = [part.transpose(1, 2)[:, :tokens].unflatten(1, lengths) for part in (query, key, value)]
    others = [part[:, :, tokens:] for part in (key, value)]
    mixed = value.new_empty(batch, *lengths, heads, width, dtype=compute_dtype(value))
    if mask is not None and mask.shape[2] == 1:
        mask = mask.expand(*mask.shape[:2], tokens, mask.shape[3])
    # What one call copies stays in cache: keys and values of each tile, or along a sequence its outputs alone.
    copied = cut.keys.size(1) * heads * width
    if len(lengths) == 1 and not others[0].shape[2]:
        copied = cut.queries.size(1) * heads * width // 4
    most = max(1, GATHERED // copied)
    if mask is not None:
        # Each tile has its own part of it.
        most = 1
    pieces = [
        (start, min(most, first + count - start))
        for first, count in cut.rows
        for start in range(first, first + count, most)
    ]
    for (start, count), sample in itertools.product(pieces, range(batch)):
        rows = cut.boxes[0][start]
        inputs = []
        for image, box in zip(images, (rows, cut.boxes[1][start], cut.boxes[1][start]), strict=True):
            inputs.append(_view_boxes(image[sample], box, count, rows[-1][1]).flatten(2, -2))
        for place, part in enumerate(others, start=1):
            if part.shape[2]:
                inputs[place] = torch.cat([inputs[place], part[sample].expand(count, -1, -1, -1)], dim=2)
        visible = cut.mask[start, 0]
        if mask is not None:
            part = mask[min(sample, len(mask) - 1)]
            visible = _combine(visible, part[:, cut.queries[start]][..., cut.keys[start]])
        attended = F.scaled_dot_product_attention(*inputs, attn_mask=visible, scale=scale)
        target = _view_boxes(mixed[sample], rows, count, rows[-1][1])
        target.copy_(attended.view(target.shape))
    return mixed.flatten(1, -3).transpose(1, 2)


def _view_boxes(image: torch.Tensor, box: Box, count: int, step: int) -> torch.Tensor:
    """View `count` boxes a step apart along the last axis of [..., H, E], the first one given: [count, H, ..., E]."""
    *outer, (start, length) = box
    for axis, (first, size) in enumerate(outer):
        image = image.narrow(axis, first, size)
    last = len(outer)
    boxes = image.narrow(last, start, (count - 1) * step + length).unfold(last, length, step)
    return boxes.permute(last, last + 1, *range(last), last + 3, last + 2)


def _mix_tiles(
    parts: tuple[torch.Tensor, ...],
    cut: Tiling,
    piece: slice,
    heads: int,
    scale: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attend within some tiles: [B, tiles * Q, H * E]."""
    assert cut.mask is not None
    queries = cut.queries[piece]
    keys = cut.keys[piece]
    batch = len(parts[0])
    tiles = len(queries)
    gathered = (
        part.index_select(1, index.flatten())
        .view(batch * tiles, index.size(1), heads, part.shape[2] // heads)
        .transpose(1, 2)
        for part, index in zip(parts, (queries, keys, keys), strict=True)
    )
    visible = cut.mask[piece].repeat(batch, 1, 1, 1)
    if mask is not None:
        visible = _combine(visible, _gather_mask(mask, queries, keys, batch))
    mixed = F.scaled_dot_product_attention(*gathered, attn_mask=visible, scale=scale)
    return mixed.transpose(1, 2).reshape(batch, queries.numel(), parts[2].shape[2])


def _gather_mask(mask: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, batch: int) -> torch.Tensor:
    """Gather each tile's part of a mask: [B or 1, H or 1, N or 1, N] -> [B * tiles, H or 1, Q or 1, K]."""
    rows = queries
    if mask.shape[2] == 1:
        # One row serves all queries.
        rows = torch.zeros_like(queries[:, :1])
    part = mask[:, :, rows[:, :, None], keys[:, None]].transpose(1, 2)
    return part.expand(batch, *part.shape[1:]).flatten(0, 1)


def _combine(window: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Combine a window and a mask into one, additive where the mask is."""
    if window is None:
        return mask
    if mask is None:
        return window
    if mask.dtype == torch.bool:
        return mask & window
    return mask.masked_fill(~window, float("-inf"))


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    axes: tuple[Axis, ...],
    *,
    scale: float | None,
    mask: torch.Tensor | None = None,
    pairs: Pairs | None = None,
) -> torch.Tensor:
    """Compute what `tiled_attention` does by definition: one softmax over all tokens under a mask; quadratic."""
    window = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        sees = torch.zeros(axis[0], axis[0], dtype=torch.bool)
        for place, seen in enumerate(rule(*axis)):
            sees[place, list(seen)] = True
        window = (window[:, None, :, None] & sees[None, :, None, :]).flatten(0, 1).flatten(1)
    if pairs is not None:
        tokens = torch.arange(len(window))
        window = window & _sees_pair(pairs, axes, tokens[:, None], tokens)
    window = F.pad(window, (0, key.shape[2] - query.shape[2]), value=True)
    return masked_softmax(query, key, value, window.to(query.device), scale=scale, mask=mask)


def masked_softmax(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute softmax attention over the pairs that are visible, [..., N, M], by definition; quadratic."""
    hidden = ~visible
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * factor
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        hidden = hidden | (mask == float("-inf"))
        scores = scores + mask
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(hidden, 0) @ value  # zeros, and not undefined, where all is hidden
