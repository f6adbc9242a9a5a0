"""Softmax over the blocks of keys that each block of queries sees, at any head width and any size of a block.

Tokens lie block by block, [heads, n * b, E], the heads of all samples in one axis; of a large block a program takes
one tile. Legend: T tokens of a tile, E channels rounded up to a power of two, which are zeros beyond the head's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 64  # the most tokens of a tile

# Of the gradients of keys and values, which hold twice as much in registers as the others.
KEY_WARPS = 8


@triton.jit
def _load_rows(part, rows, is_there, width, WIDTH: tl.constexpr):
    """Load tokens of a head, [T, E]."""
    channel = tl.arange(0, WIDTH)
    mask = is_there[:, None] & (channel < width)[None, :]
    return tl.load(part + rows[:, None] * width + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(part, rows, is_there, width, numbers, WIDTH: tl.constexpr):
    channel = tl.arange(0, WIDTH)
    mask = is_there[:, None] & (channel < width)[None, :]
    tl.store(part + rows[:, None] * width + channel[None, :], numbers.to(part.dtype.element_ty), mask=mask)


@triton.jit
def _multiply(one, other):
    """Multiply two matrices, in full precision where they are in float32."""
    return tl.dot(one, other, input_precision="ieee")


@triton.jit
def _forward(
    query,
    key,
    value,
    bias,
    chosen,
    counts,
    output,
    log_sums,
    scale,
    blocks,
    size,
    width,
    most_chosen,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(size, TILE)
    block = tl.program_id(0) // tiles
    head = tl.program_id(1).to(tl.int64)
    start = head * blocks * size
    place = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    is_query = place < size
    rows = block * size + place
    queries = _load_rows(query + start * width, rows, is_query, width, WIDTH)
    row = head * blocks + block
    # A finite start, so that a tile of hidden keys subtracts no infinity from another.
    largest = tl.full([TILE], -1.0e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(tl.load(counts + row) * tiles):
        other = tl.load(chosen + row * most_chosen + step // tiles)
        near = (step % tiles) * TILE + tl.arange(0, TILE)
        is_key = near < size
        places = other * size + near
        keys = _load_rows(key + start * width, places, is_key, width, WIDTH)
        values = _load_rows(value + start * width, places, is_key, width, WIDTH)
        added = tl.load(bias + places, mask=is_key, other=float("-inf"))
        scores = _multiply(queries, tl.trans(keys)) * scale + added[None, :]
        peak = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - peak[:, None])
        shrunk = tl.exp(largest - peak)
        total = total * shrunk + tl.sum(weights, 1)
        mixed = mixed * shrunk[:, None] + _multiply(weights.to(values.dtype), values)
        largest = peak
    _store_rows(output + start * width, rows, is_query, width, mixed / total[:, None], WIDTH)
    tl.store(log_sums + start + rows, largest + tl.log(total), mask=is_query)


@triton.jit
def _backward_query(
    query,
    key,
    value,
    bias,
    chosen,
    counts,
    gradient,
    log_sums,
    inner,
    by_query,
    scale,
    blocks,
    size,
    width,
    most_chosen,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(size, TILE)
    block = tl.program_id(0) // tiles
    head = tl.program_id(1).to(tl.int64)
    start = head * blocks * size
    place = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    is_query = place < size
    rows = block * size + place
    queries = _load_rows(query + start * width, rows, is_query, width, WIDTH)
    slopes = _load_rows(gradient + start * width, rows, is_query, width, WIDTH)
    log_sum = tl.load(log_sums + start + rows, mask=is_query, other=float("inf"))
    mean = tl.load(inner + start + rows, mask=is_query, other=0.0)
    row = head * blocks + block
    total = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(tl.load(counts + row) * tiles):
        other = tl.load(chosen + row * most_chosen + step // tiles)
        near = (step % tiles) * TILE + tl.arange(0, TILE)
        is_key = near < size
        places = other * size + near
        keys = _load_rows(key + start * width, places, is_key, width, WIDTH)
        values = _load_rows(value + start * width, places, is_key, width, WIDTH)
        added = tl.load(bias + places, mask=is_key, other=float("-inf"))
        scores = _multiply(queries, tl.trans(keys)) * scale + added[None, :]
        weights = tl.exp(scores - log_sum[:, None])
        by_scores = weights * (_multiply(slopes, tl.trans(values)) - mean[:, None])
        total += _multiply(by_scores.to(keys.dtype), keys)
    _store_rows(by_query + start * width, rows, is_query, width, total * scale, WIDTH)


@triton.jit
def _backward_key(
    query,
    key,
    value,
    bias,
    choosers,
    counts,
    gradient,
    log_sums,
    inner,
    by_key,
    by_value,
    scale,
    blocks,
    size,
    width,
    most_choosers,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradients of a tile of keys and values, from the blocks of queries that chose its block."""
    tiles = tl.cdiv(size, TILE)
    block = tl.program_id(0) // tiles
    head = tl.program_id(1).to(tl.int64)
    start = head * blocks * size
    place = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    is_key = place < size
    rows = block * size + place
    keys = _load_rows(key + start * width, rows, is_key, width, WIDTH)
    values = _load_rows(value + start * width, rows, is_key, width, WIDTH)
    added = tl.load(bias + rows, mask=is_key, other=float("-inf"))
    row = head * blocks + block
    for_keys = tl.zeros([TILE, WIDTH], tl.float32)
    for_values = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(tl.load(counts + row) * tiles):
        other = tl.load(choosers + row * most_choosers + step // tiles)
        near = (step % tiles) * TILE + tl.arange(0, TILE)
        is_query = near < size
        places = other * size + near
        queries = _load_rows(query + start * width, places, is_query, width, WIDTH)
        slopes = _load_rows(gradient + start * width, places, is_query, width, WIDTH)
        log_sum = tl.load(log_sums + start + places, mask=is_query, other=float("inf"))
        mean = tl.load(inner + start + places, mask=is_query, other=0.0)
        scores = _multiply(keys, tl.trans(queries)) * scale + added[:, None]
        weights = tl.exp(scores - log_sum[None, :])
        for_values += _multiply(weights.to(slopes.dtype), slopes)
        by_scores = weights * (_multiply(values, tl.trans(slopes)) - mean[None, :])
        for_keys += _multiply(by_scores.to(queries.dtype), queries)
    _store_rows(by_key + start * width, rows, is_key, width, for_keys * scale, WIDTH)
    _store_rows(by_value + start * width, rows, is_key, width, for_values, WIDTH)


def _settings(size: int, width: int) -> dict[str, int]:
    # Products of matrices take 16 rows and columns at least.
    tile = min(TILE, max(16, triton.next_power_of_2(size)))
    return {"TILE": tile, "WIDTH": max(16, triton.next_power_of_2(width))}


@torch.library.custom_op("diffusers_graft::block_sparse", mutates_args=())
def block_sparse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax attention of each block of queries over the blocks of keys chosen for it.

    Args:
        query, key, value: [heads, n, b, E], contiguous.
        bias: added to the scores of every key, [n, b] in float32; minus infinity hides it.
        chosen: blocks of keys, [heads, n, K] in int32.
        counts: how many of them count, the first ones, [heads, n] in int32.
        scale: factor on query-key products.

    Returns: [heads, n, b, E], and the logarithm of every query's sum, [heads, n, b] in float32.
    """
    heads, blocks, size, width = query.shape
    settings = _settings(size, width)
    output = torch.empty_like(query)
    log_sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    launch = (blocks * triton.cdiv(size, settings["TILE"]), heads)
    sizes = (blocks, size, width, chosen.shape[2])
    _forward[launch](query, key, value, bias, chosen, counts, output, log_sums, scale, *sizes, **settings)
    return output, log_sums


@block_sparse.register_fake
def _(query, key, value, bias, chosen, counts, scale):
    return torch.empty_like(query), torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)


@torch.library.custom_op("diffusers_graft::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `query`, `key` and `value` of `block_sparse`."""
    heads, blocks, size, width = query.shape
    settings = _settings(size, width)
    launch = (blocks * triton.cdiv(size, settings["TILE"]), heads)
    inner = (gradient.float() * output.float()).sum(-1)
    by_query = torch.empty_like(query)
    by_key = torch.empty_like(key)
    by_value = torch.empty_like(value)
    parts = (query, key, value, bias)
    known = (gradient, log_sums, inner)
    sizes = (blocks, size, width)
    _backward_query[launch](*parts, chosen, counts, *known, by_query, scale, *sizes, chosen.shape[2], **settings)
    choosers, chooser_counts = _turn_around(chosen, counts)
    lists = (choosers, chooser_counts)
    _backward_key[launch](
        *parts, *lists, *known, by_key, by_value, scale, *sizes, blocks, **settings, num_warps=KEY_WARPS
    )
    return by_query, by_key, by_value


@block_sparse_backward.register_fake
def _(gradient, query, key, value, bias, chosen, counts, output, log_sums, scale):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _turn_around(chosen: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """List for each block of keys the blocks of queries that chose it, [heads, n, n], and how many these are."""
    heads, blocks, most = chosen.shape
    counted = torch.arange(most, device=chosen.device) < counts[..., None]
    pairs = torch.zeros(heads, blocks, blocks, dtype=torch.int32, device=chosen.device)
    pairs.scatter_(2, chosen.long(), counted.int())
    by_key = pairs.transpose(1, 2).contiguous()
    return by_key.argsort(dim=2, descending=True, stable=True).int(), by_key.sum(2, dtype=torch.int32)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    # Whoever asks for a gradient of the sums gets an error, and not one that leaves them out.
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, gradient, _):
    gradients = block_sparse_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.scale)
    return *gradients, None, None, None, None


block_sparse.register_autograd(_differentiate, setup_context=_save)
