"""Gated short convolutions in one pass over memory: featurisers, gates and the convolution between them.

Tokens lie on a grid whose rows are `width` long; a sequence is a grid one token wide. Filters are [F, taps + 1, D],
the bias behind the taps of each: three featurisers, three and the inner one, or the inner one alone.

Legend of the kernels: T tokens and C channels of one program, `grid` is (height, width), `channel` the channels of the
program and how many there are, and `TAPS` rows and columns of a filter and how far it reaches up and left.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Of one program. As many tokens as fit its registers (Hopper, filters of four taps): a share of them is halo.
TOKENS = 32
CHANNELS = 64
WARPS = 8

# Of one that sums up a featuriser's gradients, which needs fewer registers, and leaves fewer sums to add.
FEATURE_TOKENS = 64


@triton.jit
def _load(part, stride, y, x, grid, channel):
    """Load tokens of a grid, [T, C]; zeros outside of it."""
    inside = (y >= 0) & (y < grid[0]) & (x >= 0) & (x < grid[1])
    # One sample of a long video has more numbers than 32 bits count.
    place = (y * grid[1] + x).to(tl.int64)[:, None] * stride + channel[0][None, :]
    return tl.load(part + place, mask=inside[:, None] & (channel[0] < channel[1])[None, :], other=0.0)


@triton.jit
def _load_tap(filters, tap, channel):
    """Load one tap of a filter, [1, C]."""
    return tl.load(filters + tap * channel[1] + channel[0], mask=channel[0] < channel[1], other=0.0)[None, :]


@triton.jit
def _convolve(part, stride, filters, y, x, grid, channel, TAPS: tl.constexpr):
    """Convolve at places of a grid, [T, C]."""
    rows: tl.constexpr = TAPS[0]
    columns: tl.constexpr = TAPS[1]
    total = _load_tap(filters, rows * columns, channel)
    for row in tl.static_range(rows):
        for column in tl.static_range(columns):
            near = _load(part, stride, y + row - TAPS[2], x + column - TAPS[3], grid, channel)
            total = total + _load_tap(filters, row * columns + column, channel) * near.to(filters.dtype.element_ty)
    return total


@triton.jit
def _featurise(part, stride, filters, y, x, grid, channel, TAPS: tl.constexpr, FEATURISED: tl.constexpr):
    """Convolve queries, keys or values, or take them as they are."""
    if FEATURISED:
        return _convolve(part, stride, filters, y, x, grid, channel, TAPS)
    return _load(part, stride, y, x, grid, channel).to(filters.dtype.element_ty)


@triton.jit
def _multiply(key, value, stride, filters, y, x, grid, channel, TAPS: tl.constexpr, FEATURISED: tl.constexpr):
    """Multiply features of keys and values; zeros outside of the grid, where there are biases alone."""
    size = (TAPS[0] * TAPS[1] + 1) * channel[1]
    keys = _featurise(key, stride, filters + size, y, x, grid, channel, TAPS, FEATURISED)
    values = _featurise(value, stride, filters + 2 * size, y, x, grid, channel, TAPS, FEATURISED)
    inside = (y >= 0) & (y < grid[0]) & (x >= 0) & (x < grid[1])
    return tl.where(inside[:, None], keys * values, 0.0)


@triton.jit
def _place(width, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return rows and columns of the tokens of this program, and its channels."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return token // width, token % width, channel


@triton.jit
def _forward(
    query,
    key,
    value,
    filters,
    output,
    sample_stride,
    stride,
    height,
    width,
    channels,
    TAPS: tl.constexpr,
    FEATURISED: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    rows: tl.constexpr = TAPS[0]
    columns: tl.constexpr = TAPS[1]
    sample = tl.program_id(2).to(tl.int64)
    y, x, places = _place(width, channels, TOKENS, CHANNELS)
    grid = (height, width)
    channel = (places, channels)
    query += sample * sample_stride
    key += sample * sample_stride
    value += sample * sample_stride
    if INNER:
        inner = filters + 3 * FEATURISED * (rows * columns + 1) * channels
        mixed = _load_tap(inner, rows * columns, channel)
        for row in tl.static_range(rows):
            for column in tl.static_range(columns):
                up = y + row - TAPS[2]
                left = x + column - TAPS[3]
                near = _multiply(key, value, stride, filters, up, left, grid, channel, TAPS, FEATURISED)
                mixed = mixed + _load_tap(inner, row * columns + column, channel) * near
    else:
        mixed = _multiply(key, value, stride, filters, y, x, grid, channel, TAPS, FEATURISED)
    mixed = mixed * _featurise(query, stride, filters, y, x, grid, channel, TAPS, FEATURISED)
    _store(output + sample * height * width * channels, mixed, y, x, grid, channel)


@triton.jit
def _store(output, numbers, y, x, grid, channel):
    """Store tokens, [T, C], of one sample whose tokens lie one behind the other."""
    place = (y * grid[1] + x).to(tl.int64)[:, None] * channel[1] + channel[0][None, :]
    inside = (y < grid[0])[:, None] & (channel[0] < channel[1])[None, :]
    tl.store(output + place, numbers.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _store_tap(sums, tap, numbers, channel):
    """Store what the tokens of this program, [T, C], add to the gradient of a tap."""
    tl.store(sums + tap * channel[1] + channel[0], tl.sum(numbers, 0), mask=channel[0] < channel[1])


@triton.jit
def _backward_gates(
    query,
    key,
    value,
    filters,
    gradient,
    by_query,
    by_key,
    by_value,
    sums,
    sample_stride,
    stride,
    height,
    width,
    channels,
    TAPS: tl.constexpr,
    FEATURISED: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of the features of queries, keys and values, and of the inner filter."""
    rows: tl.constexpr = TAPS[0]
    columns: tl.constexpr = TAPS[1]
    sample = tl.program_id(2).to(tl.int64)
    y, x, places = _place(width, channels, TOKENS, CHANNELS)
    grid = (height, width)
    channel = (places, channels)
    count: tl.constexpr = rows * columns
    size = (count + 1) * channels
    query += sample * sample_stride
    key += sample * sample_stride
    value += sample * sample_stride
    start = sample * height * width * channels
    gradient += start
    slope = _load(gradient, channels, y, x, grid, channel).to(filters.dtype.element_ty)
    by_mixed = slope * _featurise(query, stride, filters, y, x, grid, channel, TAPS, FEATURISED)
    if INNER:
        inner = filters + 3 * FEATURISED * size
        sums += (sample * tl.num_programs(0) + tl.program_id(0)) * size
        mixed = _load_tap(inner, count, channel)
        by_product = tl.zeros_like(by_mixed)
        _store_tap(sums, count, by_mixed, channel)
        for row in tl.static_range(rows):
            for column in tl.static_range(columns):
                tap = _load_tap(inner, row * columns + column, channel)
                up = y + row - TAPS[2]
                left = x + column - TAPS[3]
                near = _multiply(key, value, stride, filters, up, left, grid, channel, TAPS, FEATURISED)
                mixed = mixed + tap * near
                _store_tap(sums, row * columns + column, by_mixed * near, channel)
                # The outputs that this product went into.
                down = y - row + TAPS[2]
                right = x - column + TAPS[3]
                back = _load(gradient, channels, down, right, grid, channel).to(filters.dtype.element_ty)
                back *= _featurise(query, stride, filters, down, right, grid, channel, TAPS, FEATURISED)
                by_product += tap * back
    else:
        mixed = _multiply(key, value, stride, filters, y, x, grid, channel, TAPS, FEATURISED)
        by_product = by_mixed
    keys = _featurise(key, stride, filters + size, y, x, grid, channel, TAPS, FEATURISED)
    values = _featurise(value, stride, filters + 2 * size, y, x, grid, channel, TAPS, FEATURISED)
    _store(by_query + start, slope * mixed, y, x, grid, channel)
    _store(by_key + start, by_product * values, y, x, grid, channel)
    _store(by_value + start, by_product * keys, y, x, grid, channel)


@triton.jit
def _backward_features(
    part,
    by_feature,
    filters,
    by_part,
    sums,
    sample_stride,
    stride,
    height,
    width,
    channels,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of one featuriser and of what it convolves."""
    rows: tl.constexpr = TAPS[0]
    columns: tl.constexpr = TAPS[1]
    sample = tl.program_id(2).to(tl.int64)
    y, x, places = _place(width, channels, TOKENS, CHANNELS)
    grid = (height, width)
    channel = (places, channels)
    count: tl.constexpr = rows * columns
    part += sample * sample_stride
    start = sample * height * width * channels
    by_feature += start
    sums += (sample * tl.num_programs(0) + tl.program_id(0)) * (count + 1) * channels
    slope = _load(by_feature, channels, y, x, grid, channel).to(filters.dtype.element_ty)
    _store_tap(sums, count, slope, channel)
    total = tl.zeros_like(slope)
    for row in tl.static_range(rows):
        for column in tl.static_range(columns):
            near = _load(part, stride, y + row - TAPS[2], x + column - TAPS[3], grid, channel)
            _store_tap(sums, row * columns + column, slope * near.to(slope.dtype), channel)
            back = _load(by_feature, channels, y - row + TAPS[2], x - column + TAPS[3], grid, channel)
            total += _load_tap(filters, row * columns + column, channel) * back.to(slope.dtype)
    _store(by_part + start, total, y, x, grid, channel)


def _launch_grid(query: torch.Tensor, tokens: int) -> tuple[int, int, int]:
    return triton.cdiv(query.shape[1], tokens), triton.cdiv(query.shape[2], CHANNELS), len(query)


def _settings(filters: torch.Tensor, taps: list[int]) -> dict[str, Any]:
    """Return what a launch is compiled for."""
    count = len(filters)
    blocks = {"TOKENS": TOKENS, "CHANNELS": CHANNELS, "num_warps": WARPS}
    return {"TAPS": tuple(taps), "FEATURISED": count >= 3, "INNER": count != 3, **blocks}


@torch.library.custom_op("diffusers_graft::gated_convolution", mutates_args=())
def gated_convolution(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    filters: torch.Tensor,
    taps: list[int],
    height: int,
    width: int,
) -> torch.Tensor:
    """Return query * inner(key * value), each after its featuriser where there are featurisers: [B, N, D].

    Args:
        query, key, value: [B, N, D] with the same strides, channels one behind the other.
        filters: [F, taps + 1, D] in float32, or float64; what is computed is added up in that precision.
        taps: rows and columns of a filter, and how far it reaches up and left.
        height, width: of the grid of N tokens.
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _forward[_launch_grid(query, TOKENS)](
        query,
        key,
        value,
        filters,
        output,
        query.stride(0),
        query.stride(1),
        height,
        width,
        query.shape[2],
        **_settings(filters, taps),
    )
    return output


@gated_convolution.register_fake
def _(query, key, value, filters, taps, height, width):
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@torch.library.custom_op("diffusers_graft::gated_convolution_backward", mutates_args=())
def gated_convolution_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    filters: torch.Tensor,
    taps: list[int],
    height: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `query`, `key`, `value` and `filters` of `gated_convolution`."""
    launch = _launch_grid(query, TOKENS)
    settings = _settings(filters, taps)
    geometry = (query.stride(0), query.stride(1), height, width, query.shape[2])
    parts = (query, key, value)
    gradients = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in parts]
    # Every program writes its own sums, which are added up in one order: runs repeat bit for bit.
    sums = filters.new_empty(launch[0] * launch[2], *filters.shape[1:])
    _backward_gates[launch](*parts, filters, gradient, *gradients, sums, *geometry, **settings)
    by_filters = []
    if settings.pop("INNER"):
        by_filters.append(sums.sum(0))
    if settings.pop("FEATURISED"):
        settings["TOKENS"] = FEATURE_TOKENS
        launch = _launch_grid(query, FEATURE_TOKENS)
        sums = filters.new_empty(launch[0] * launch[2], *filters.shape[1:])
        for place, part in enumerate(parts):
            by_feature = gradients[place]
            gradients[place] = torch.empty_like(by_feature)
            tensors = (part, by_feature, filters[place], gradients[place], sums)
            _backward_features[launch](*tensors, *geometry, **settings)
            by_filters.insert(place, sums.sum(0))
    by_query, by_key, by_value = gradients
    return by_query, by_key, by_value, torch.stack(by_filters)


@gated_convolution_backward.register_fake
def _(gradient, query, key, value, filters, taps, height, width):
    made = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3)]
    return *made, torch.empty_like(filters)


def _save(ctx, inputs, output):
    *tensors, ctx.taps, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, gradient):
    tensors = ctx.saved_tensors
    gradients = gated_convolution_backward(gradient.contiguous(), *tensors, ctx.taps, ctx.height, ctx.width)
    return *gradients, None, None, None


gated_convolution.register_autograd(_differentiate, setup_context=_save)
