"""Blocks of the token grid: tiles whose tokens share what is decided for them, such as the blocks of keys they see.

Legend beside that of `base`: n blocks, b tokens of a block, K blocks that a block of queries sees. Where a grid does
not divide, its last blocks have places without a token, which are hidden.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...core.context import Context, Grid
from ...errors import GeometryError, OperatorError
from ..base import Mixer
from .backends import autocast_device, runs_in_pieces, specialize
from .masks import key_bias
from .settings import require_count
from .tiles import GATHERED, outer_places

logger = logging.getLogger(__name__)

# The sides of a block along frames, height and width.
Sides = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Mixer.Config):
    """Settings of operators that choose keys block by block.

    Attributes:
        block: side of a block in tokens, a square of images and a cube of videos; of videos also (frames, height,
            width). A side longer than the grid's is as long as that.
        keep: blocks of keys that each block of queries sees under softmax, a count; or a share of all, above 0 and up
            to 1, rounded up.
    """

    block: int | tuple[int, int, int] = 8
    keep: int | float = 8

    def __post_init__(self):
        super().__post_init__()
        who = self.owner.name
        sides = self.block if isinstance(self.block, tuple) else (self.block,)
        if len(sides) not in (1, 3) or not all(type(side) is int and side > 0 for side in sides):
            raise OperatorError(
                f"{who}: block is a count of tokens, or three of them for frames, height and width; "
                f"got {self.block!r}. Try 8 or (4, 4, 4)."
            )
        if type(self.keep) is not float:
            require_count(who, "keep", self.keep, example=8)
        elif not 0 < self.keep <= 1:
            raise OperatorError(
                f"{who}: keep is a count of blocks, or a share of them above 0 and up to 1; got {self.keep!r}. "
                "Try 8 or 0.125."
            )

    def sides_on(self, grid: Grid) -> Sides:
        """Return the sides of a block on a grid. Raises `GeometryError` for a video's block on an image."""
        sides = self.block
        if isinstance(sides, int):
            sides = (sides, sides, sides)
        elif grid.frames == 1:
            raise GeometryError(
                f"{self.owner.name}: block {sides} is for the frames, height and width of a video, and the grid is "
                f"{grid}. Give one number for an image."
            )
        lengths = (grid.frames, grid.height, grid.width)
        return tuple(map(min, sides, lengths))

    def kept_of(self, blocks: int) -> int:
        """Return how many of `blocks` blocks are kept: all, which is said once, where there are fewer than asked."""
        if isinstance(self.keep, float):
            # Rounded first: 0.07 * 100 is a little more than 7.
            return max(1, math.ceil(round(self.keep * blocks, 6)))
        # Nobody asked for the default, which is for larger grids.
        needs_prediction = self.keep != type(self).keep
        if needs_prediction and self.keep > blocks and not torch.compiler.is_compiling():
            _say_all_kept(self.owner.name, self.keep, blocks)
        return min(self.keep, blocks)


@functools.cache
def _say_all_kept(who: str, keep: int, blocks: int) -> None:
    """Warn once that nothing is left out."""
    logger.warning("%s: keep=%d blocks are all of the %d there are, so softmax sees every key.", who, keep, blocks)


@dataclass(frozen=True)
class Blocks:
    """Tokens of the blocks of a grid, and the way back.

    Attributes:
        places: raster indices of the tokens of each block, [n, b]; a place without a token repeats another.
        is_real: whether there is a token at a place, [n, b]; None where there always is.
        inverse: place of every token in the flattened blocks, [N].
    """

    places: torch.Tensor
    is_real: torch.Tensor | None
    inverse: torch.Tensor


# Functions, since compiled code knows no methods of the constants that blocks are there.
def split_blocks(part: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Cut [B, H, N, E] into blocks, [B, H, n, b, E]."""
    return part.index_select(2, blocks.places.flatten()).unflatten(2, blocks.places.size())


def join_blocks(parts: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Put the tokens of blocks, [B, H, n, b, E], in raster order, [B, H, N, E]."""
    return parts.flatten(2, 3).index_select(2, blocks.inverse)


def _make_blocks(lengths: Sides, sides: Sides, device: torch.device) -> Blocks:
    # Blocks outlive the mode they are made in, and inference tensors could never be trained with.
    with torch.inference_mode(False), torch.device("cpu"):
        places = torch.zeros(1, 1, dtype=torch.long)
        outside = torch.zeros(1, 1, dtype=torch.long)
        block = torch.zeros(1, dtype=torch.long)
        within = torch.zeros(1, dtype=torch.long)
        for length, side in zip(lengths, sides, strict=True):
            count = -(-length // side)
            axis = torch.arange(count * side).view(count, side)
            places = outer_places(places, axis.clamp(max=length - 1), length)
            # A place is outside where it is on any axis: a digit of base 2 for each.
            outside = outer_places(outside, (axis >= length).long(), 2)
            along = torch.arange(length)
            block = (block[:, None] * count + along // side).flatten()
            within = (within[:, None] * side + along % side).flatten()
        inverse = block * math.prod(sides) + within
        is_real = None
        if places.numel() > math.prod(lengths):
            is_real = (outside == 0).to(device)
        return Blocks(places.to(device), is_real, inverse.to(device))


_cached_blocks = functools.lru_cache(maxsize=64)(_make_blocks)


@torch.compiler.assume_constant_result
def _constant_blocks(lengths: Sides, sides: Sides, device: torch.device) -> Blocks:
    return _cached_blocks(lengths, sides, device)


def blocks_of(config: BlockConfig, grid: Grid, like: torch.Tensor) -> Blocks:
    """Return the blocks of a grid, made once for each geometry and device."""
    # Tensors that only pretend, as in FakeTensorMode, need blocks of their kind, not to be cached for real ones.
    make = _constant_blocks if type(like) is torch.Tensor else _make_blocks
    lengths = tuple(map(specialize, (grid.frames, grid.height, grid.width)))
    sides = tuple(map(specialize, config.sides_on(grid)))
    return make(lengths, sides, like.device)


def count_blocks(config: BlockConfig, grid: Grid | None, tokens: int) -> tuple[int, int]:
    """Count the blocks of a grid, and the tokens of one; of an unknown grid, those of a flat sequence."""
    if grid is None:
        sides = config.block
        if isinstance(sides, int):
            sides = (sides, sides)
        size = min(math.prod(sides), tokens)
        return -(-tokens // size), size
    sides = config.sides_on(grid)
    lengths = (grid.frames, grid.height, grid.width)
    counts = [-(-length // side) for length, side in zip(lengths, sides, strict=True)]
    return math.prod(counts), math.prod(sides)


@dataclass(frozen=True)
class Cut:
    """The tensors of a forward in blocks, and what is known of each block as a whole.

    Attributes:
        blocks: of the grid.
        query, key, value: [B, H, n, b, E].
        bias: of each key, added to its scores, [B or 1, H or 1, n, b]; None where it is zero everywhere.
        visible: 1 for each key that is not hidden, else 0, as `bias`; None where none is.
        count: keys of each block that are not hidden, [B or 1, H or 1, n].
        scores: scale times products of the mean queries and mean keys of blocks, [B, H, n, n], in float32 at least;
            the least number there is for a block without keys.
        others: keys and values behind the grid's, [B, H, M - N, E], and what is added to their scores, [B or 1, H or
            1, 1, M - N] or None.
        scale: factor on query-key products.
    """

    blocks: Blocks
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    visible: torch.Tensor | None
    count: torch.Tensor
    scores: torch.Tensor
    others: Extra
    scale: float


# Keys and values that every query sees besides, and what is added to their scores.
Extra = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def cut_into_blocks(
    operator: Mixer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
) -> Cut:
    """Cut a forward into the blocks that an operator's config names.

    Args:
        operator: whose config is a `BlockConfig`.
        query: [B, H, N, E].
        key, value: [B, H, M, E], the grid's N first.
        context: of the forward; its mask hides the same keys from every query.

    Raises `GeometryError` without a grid, and `OperatorError` for a mask that differs from query to query.
    """
    tokens = query.shape[2]
    config: Any = operator.config
    blocks = blocks_of(config, context.require_grid(operator.name, tokens), query)
    others_bias = None
    bias = _hide_gaps(blocks, key)
    if context.mask is not None:
        given = key_bias(operator.name, context.mask, key.shape[2], key.dtype)
        if key.shape[2] > tokens:
            others_bias = given[:, :, None, tokens:]
        given = given[:, :, blocks.places]
        # Gaps stay hidden: they repeat a token's bias, to which minus infinity is added.
        bias = given if bias is None else bias + given
    scale = query.shape[-1] ** -0.5 if context.scale is None else context.scale
    others = (key[:, :, tokens:], value[:, :, tokens:], others_bias)
    query = split_blocks(query, blocks)
    key = split_blocks(key, blocks)
    precise = torch.promote_types(key.dtype, torch.float32)
    visible = None
    count = torch.full((1, 1, key.shape[2]), float(key.shape[3]), dtype=precise, device=key.device)
    if bias is not None:
        # What the exponential takes for zero is hidden; any other bias leaves a key as visible as the others.
        visible = (bias.to(precise).exp() > 0).to(precise)
        count = visible.sum(-1)
    # Which blocks are chosen must not depend on a short mantissa.
    with torch.autocast(autocast_device(key), enabled=False):
        # Queries of hidden tokens count: a mask is on keys.
        is_real = None if blocks.is_real is None else blocks.is_real.to(precise)[None, None]
        mean_query = mean_of_blocks(query.to(precise), is_real)
        mean_key = mean_of_blocks(key.to(precise), visible)
        scores = scale * (mean_query @ mean_key.transpose(-1, -2))
        scores = scores.masked_fill(count[:, :, None] == 0, torch.finfo(precise).min)
    return Cut(
        blocks=blocks,
        query=query,
        key=key,
        value=split_blocks(value, blocks),
        bias=bias,
        visible=visible,
        count=count,
        scores=scores,
        others=others,
        scale=scale,
    )


def _hide_gaps(blocks: Blocks, like: torch.Tensor) -> torch.Tensor | None:
    """Return minus infinity for places without a token, [1, 1, n, b]; None where there are none."""
    if blocks.is_real is None:
        return None
    zeros = torch.zeros(blocks.is_real.size(), dtype=like.dtype, device=like.device)
    return zeros.masked_fill(~blocks.is_real, float("-inf"))[None, None]


def mean_of_blocks(parts: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Average over the tokens of each block that weigh 1 and not 0: [B, H, n, b, E] -> [B, H, n, E]."""
    if weight is None:
        return parts.mean(3)
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    return (parts * weight[..., None]).sum(3) / count


def attend_chosen(
    cut: Cut,
    chosen: torch.Tensor,
    *,
    dropped: torch.Tensor | None = None,
    extra: Extra | None = None,
) -> torch.Tensor:
    """Compute softmax attention of each block of queries over the blocks of keys chosen for it, and some keys more.

    Args:
        cut: queries, keys and values in blocks.
        chosen: blocks of keys, [B, H, n, K].
        dropped: whether a chosen block is left out after all, [B, H, n, K].
        extra: keys and values [B, H, M, E] that every query sees besides, and what is added to their scores, [B or
            1, H or 1, n or 1, M]; those of `cut` unless given.

    Returns: [B, H, n, b, E].
    """
    extra_key, extra_value, extra_bias = extra or cut.others
    batch, heads, n, size, width = cut.key.shape
    more = extra_key.shape[2]
    first = torch.arange(batch * heads, device=chosen.device).view(batch, heads, 1, 1) * n
    rows = (first + chosen).flatten(0, 2)
    added = None
    if cut.bias is not None or dropped is not None or extra_bias is not None:
        # One row of biases for all the queries of a block.
        added = _gather_bias(cut, rows, dropped)
        if more:
            zeros = added.new_zeros(1, 1, 1, 1) if extra_bias is None else extra_bias.to(added.dtype)
            added = torch.cat([added, zeros.expand(batch, heads, n, more).flatten(0, 2)], dim=-1)
        added = added[:, None, None]
    # A block is one row of memory, which is gathered fastest.
    key_rows = cut.key.flatten(3).flatten(0, 2)
    value_rows = cut.value.flatten(3).flatten(0, 2)
    queries = cut.query.flatten(0, 2)[:, None]

    def gather(part: torch.Tensor, extra_part: torch.Tensor, piece: slice) -> torch.Tensor:
        some = rows[piece]
        found = part.index_select(0, some.flatten()).view(some.shape[0], 1, -1, width)
        if not more:
            return found
        # Rows of one head after the other share the extra keys of their head.
        head = torch.arange(piece.start, piece.stop, device=part.device) // n
        return torch.cat([found, extra_part.flatten(0, 1).index_select(0, head)[:, None]], dim=2)

    def attend(piece: slice) -> torch.Tensor:
        keys = gather(key_rows, extra_key, piece)
        values = gather(value_rows, extra_value, piece)
        mask = None if added is None else added[piece]
        return F.scaled_dot_product_attention(queries[piece], keys, values, attn_mask=mask, scale=cut.scale)

    pieces = _pieces(cut.key, len(queries), rows.shape[1] * size)
    attended = attend(pieces[0])
    if len(pieces) > 1:
        # Into one tensor: new memory for every piece would cost more than copies that are still in cache.
        joined = attended.new_empty(len(queries), *attended.shape[1:])
        joined[pieces[0]] = attended
        for piece in pieces[1:]:
            joined[piece] = attend(piece)
        attended = joined
    return attended.view(batch, heads, n, size, width)


def attend_chosen_in_triton(cut: Cut, chosen: torch.Tensor, *, dropped: torch.Tensor | None = None) -> torch.Tensor:
    """Compute what `attend_chosen` does by a kernel that gathers nothing; without masks and other keys.

    Args:
        dropped: of the chosen blocks, the last ones of each row.
    """
    from ..kernels.block_sparse import block_sparse

    _, _, n, size, _ = cut.key.shape
    parts = [part.flatten(0, 1).contiguous() for part in (cut.query, cut.key, cut.value)]
    rows = chosen.flatten(0, 1).int().contiguous()
    counts = torch.full(rows.shape[:2], rows.shape[2], dtype=torch.int32, device=rows.device)
    if dropped is not None:
        counts = counts - dropped.flatten(0, 1).sum(-1, dtype=torch.int32)
    # Without a mask it is the same in all heads: places without a token.
    bias = torch.zeros(n, size, device=rows.device)
    if cut.bias is not None:
        bias = cut.bias[0, 0].float()
    mixed, _ = block_sparse(*parts, bias, rows, counts, cut.scale)
    return mixed.view(cut.query.shape)


def _pieces(like: torch.Tensor, rows: int, keys: int) -> list[slice]:
    """Cut rows into pieces whose keys stay in cache, where that is faster."""
    step = rows
    if runs_in_pieces(like):
        # Half of them keys, half of them values.
        step = max(1, GATHERED // (2 * keys * like.shape[-1]))
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def _gather_bias(cut: Cut, rows: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    """Return what is added to the scores of the gathered keys, [B * H * n, K * b]."""
    batch, heads, n, size, _ = cut.key.shape
    # A view of one zero, which takes no memory where there is nothing to add.
    added = cut.key.new_zeros(1, 1, 1).expand(rows.shape[0], rows.shape[1], size)
    if cut.bias is not None:
        flat = cut.bias.expand(batch, heads, n, size).flatten(0, 2)
        added = flat.index_select(0, rows.flatten()).view(added.shape)
    if dropped is not None:
        added = added.masked_fill(dropped.flatten(0, 2)[..., None], float("-inf"))
    return added.flatten(1)


def nearest_blocks(config: BlockConfig, grid: Grid, kept: int, device: torch.device) -> torch.Tensor:
    """Return the `kept` blocks nearest to each on the grid of blocks, itself among them, [n, kept]."""
    axes = []
    for length, side in zip((grid.frames, grid.height, grid.width), config.sides_on(grid), strict=True):
        axes.append(torch.arange(-(-length // side), device=device))
    places = torch.cartesian_prod(*axes)
    distance = (places[:, None] - places[None]).square().sum(-1)
    # Of blocks as far away as each other the first; whole numbers, so that no rounding decides.
    count = len(places)
    order = distance * count + torch.arange(count, device=device)
    return order.topk(kept, dim=-1, largest=False).indices


def chosen_pairs(chosen: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return whether a block of keys is chosen for one of queries, [..., n, n], from those chosen, [..., n, K]."""
    pairs = torch.zeros(*chosen.shape[:-1], blocks, dtype=torch.bool, device=chosen.device)
    return pairs.scatter(-1, chosen, True)


def pairs_of_tokens(chosen: torch.Tensor, blocks: Blocks, others: int) -> torch.Tensor:
    """Return which pairs of tokens are in chosen pairs of blocks, for definitions: quadratic.

    Args:
        chosen: whether a block of keys is chosen for a block of queries, [..., n, n].
        others: keys behind the grid's, which every query sees.

    Returns: [..., N, N + others].
    """
    block = blocks.inverse // blocks.places.size(1)
    pairs = chosen[..., block, :][..., block]
    return F.pad(pairs, (0, others), value=True)
