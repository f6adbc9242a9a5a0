"""Softmax attention of videos whose reach falls with the distance in time: static rays around the diagonal.

Paper: Radial Attention, arXiv 2506.19852, and its code, where both say how wide a ray is. Reach is along the raster
order of a frame. The code rounds that to blocks, for its kernel: a setting.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..core.context import Context, Grid
from ..core.shapes import HeadTensor, KeyTensor
from ..errors import OperatorError
from .base import Mixer, rare
from .ops.settings import require_count, require_flag
from .ops.tiles import Tiling, attend_in_tiles, masked_softmax, ragged_tiling

# Tokens of a tile, which gathers the keys that any of them sees.
TILE = 64

# Queries of a tile, and the keys that any of them sees.
Tile = tuple[list[int], list[int]]


class Radial(Mixer):
    """A token sees all of its frame and the next on both sides; in others the tokens at places as near as a reach.

    The reach halves whenever the distance in frames reaches a power of two; below `least` tokens it stays there, and
    only every so many-th frame is seen. On one or two frames it is softmax attention. A prompt's keys are in the same
    softmax.
    """

    needs_grid = True
    honours_mask = True
    honours_others = True
    ignores_attention_backend = True
    exact_with = "one or two frames"
    paper = "Radial Attention: O(n log n) Sparse Attention for Long Video Generation, arXiv 2506.19852"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings of the rays.

        Attributes:
            decay: factor on every reach, above 0 and up to 1 (the paper: 0.2 to 0.95, by model and length).
            least: tokens below which a reach does not fall (its code: 64 or 128).
            sink: whether every token sees the first frame.
            block: tokens of a block, in raster order, to which rays are rounded (its code: 64 or 128); None leaves
                them as they are.
        """

        decay: float = 1.0
        least: int = 64
        sink: bool = True
        block: int | None = rare(None)

        def __post_init__(self):
            super().__post_init__()
            is_number = isinstance(self.decay, int | float) and not isinstance(self.decay, bool)
            if not is_number or not 0 < self.decay <= 1:
                raise OperatorError(
                    f"radial: decay is a factor above 0 and up to 1; got {self.decay!r}. Try 1.0 or 0.5."
                )
            require_count("radial", "least", self.least, example=64)
            require_flag("radial", "sink", self.sink)
            if self.block is not None:
                require_count("radial", "block", self.block, example=64)

        def reaches(self, frames: int, size: int) -> list[int]:
            """List the reach in frames as far away as 0, 1, ...: `size` tokens if all are seen, -1 if none is."""
            # A token's frame and its neighbours are seen in full.
            found = [size, size][:frames]
            for distance in range(2, frames):
                reach = 2 ** size.bit_length() / 2 ** distance.bit_length()
                is_seen = reach >= self.least or distance % int(self.least / reach) == 0
                found.append(min(size, int(max(self.decay * reach, self.least))) if is_seen else -1)
            return found

    def forward(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        grid = context.require_grid(self.name, query.shape[2])
        if grid.frames < 3:
            return context.attend(query, key, value, mask=context.mask, scale=context.scale)
        sides = (grid.frames, grid.height * grid.width)
        others = key.shape[2] - query.shape[2]
        # Tensors that only pretend, as in FakeTensorMode, need a tiling of their kind, not to be cached for real ones.
        make = _find_tiling if type(query) is torch.Tensor else _make_tiling
        cut = self.constant(make, self.settings, sides, others, query.device)
        return attend_in_tiles(query, key, value, cut, sides, scale=context.scale, mask=context.mask)

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute by definition: softmax over all tokens under a mask."""
        grid = context.require_grid(self.name, query.shape[2])
        tokens = torch.arange(grid.tokens, device=query.device)
        visible = sees(self.config, (grid.frames, grid.height * grid.width), tokens[:, None], tokens)
        visible = torch.nn.functional.pad(visible, (0, key.shape[2] - grid.tokens), value=True)
        return masked_softmax(query, key, value, visible, scale=context.scale, mask=context.mask)

    def receptive_field(self, token: int, grid: Grid) -> set[int]:
        tokens = torch.arange(grid.tokens, device="cpu")
        visible = sees(self.config, (grid.frames, grid.height * grid.width), tokens[token], tokens)
        return set(visible.nonzero().flatten().tolist())

    def flops(self, tokens: int) -> int:
        """Price the last forward's video, or an image, where all tokens see each other."""
        return 4 * self._count_pairs(tokens) * self.site.inner_width

    def uncounted_flops(self, tokens: int) -> int:
        """Subtract the pairs that the reference computes and its mask hides."""
        return -4 * (tokens**2 - self._count_pairs(tokens)) * self.site.inner_width

    countable = reference

    def _count_pairs(self, tokens: int) -> int:
        grid = self.last_grid(tokens)
        if grid is None:
            return tokens**2
        size = grid.height * grid.width
        if self.config.block is not None:
            return _count_pairs_of_blocks(self.config.block, tokens, visible_blocks(self.config, (grid.frames, size)))
        reaches = self.config.reaches(grid.frames, size)
        pairs = 0
        for row in range(grid.frames):
            for column in range(grid.frames):
                reach = reaches[abs(row - column)]
                if self.config.sink and column == 0:
                    reach = size
                # Pairs of a band of a square, cut off at its corners.
                pairs += size if reach >= 0 else 0
                pairs += sum(2 * (size - step) for step in range(1, min(reach, size - 1) + 1))
        return pairs


def sees(config: Radial.Config, sides: tuple[int, int], query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return whether a query sees a key.

    Args:
        sides: frames, and tokens of a frame.
        query, key: raster indices that broadcast.
    """
    frames, size = sides
    if config.block is not None:
        visible = torch.tensor(visible_blocks(config, sides), device=query.device)
        return visible[query // config.block, key // config.block]
    reaches = torch.tensor(config.reaches(frames, size), device=query.device)
    frame = key // size
    reach = reaches[(query // size - frame).abs()]
    visible = (query % size - key % size).abs() <= reach
    if config.sink:
        visible = visible | (frame == 0)
    return visible


# Numbers and not a tensor, which would belong to one device and one mode.
@functools.lru_cache(maxsize=64)
def visible_blocks(config: Radial.Config, sides: tuple[int, int]) -> list[list[bool]]:
    """Return whether a block of queries sees a block of keys, by the rule of the paper's code, [blocks][blocks].

    It does where more than 60 % of the keys that any of its queries sees are seen by more than a third of them. A
    block always sees itself.
    """
    assert config.block is not None
    frames, size = sides
    tokens = frames * size
    count = -(-tokens // config.block)
    visible = []
    with unset_fake_temporarily(), torch.device("cpu"):
        frame = torch.arange(tokens) // size
        for number in range(count):
            first = number * config.block
            end = min(first + config.block, tokens)
            seen_by = torch.zeros(tokens, dtype=torch.long)
            # A block may begin in one frame and end in another.
            for row_frame in range(first // size, (end - 1) // size + 1):
                low = max(0, first - row_frame * size)
                high = min(size, end - row_frame * size) - 1
                seen_by += _count_seeing(config, sides, row_frame, frame, (low, high))
            by_block = F.pad(seen_by, (0, count * config.block - tokens)).view(count, config.block)
            touched = (by_block > 0).sum(1)
            dense = (3 * by_block > end - first).sum(1)
            row = (5 * dense > 3 * touched).tolist()
            row[number] = True
            visible.append(row)
    return visible


def _count_seeing(
    config: Radial.Config, sides: tuple[int, int], row_frame: int, frame: torch.Tensor, rows: tuple[int, int]
) -> torch.Tensor:
    """Count the queries at the places from `rows[0]` to `rows[1]` of a frame that see each key, [N].

    Args:
        row_frame: the frame of the queries.
        frame: of each key.
    """
    frames, size = sides
    low, high = rows
    place = torch.arange(frames * size) % size
    reach = torch.tensor(config.reaches(frames, size))[(frame - row_frame).abs()]
    if config.sink:
        reach = reach.masked_fill(frame == 0, size)
    nearest = (place - reach).clamp(min=low)
    farthest = (place + reach).clamp(max=high)
    return (farthest - nearest + 1).clamp(min=0)


def _count_pairs_of_blocks(block: int, tokens: int, visible: list[list[bool]]) -> int:
    sizes = [min(block, tokens - start) for start in range(0, tokens, block)]
    pairs = 0
    for size, row in zip(sizes, visible, strict=True):
        pairs += size * sum(other for other, is_visible in zip(sizes, row, strict=True) if is_visible)
    return pairs


def _make_tiling(config: Radial.Config, sides: tuple[int, int], others: int, device: torch.device) -> Tiling:
    make = _tiles_of_rays if config.block is None else _tiles_of_blocks
    return ragged_tiling(make(config, sides), functools.partial(sees, config, sides), others, device)


def _tiles_of_rays(config: Radial.Config, sides: tuple[int, int]) -> list[Tile]:
    frames, size = sides
    reaches = config.reaches(frames, size)
    count = min(TILE, size)
    tiles = []
    for frame in range(frames):
        # Tiles lie within a frame, since places wrap at its end and reaches do not.
        for start in range(0, size, count):
            # The last tile of a frame overlaps the one before, where tiles do not divide it.
            first = min(start, size - count)
            keys = []
            for other in range(frames):
                reach = reaches[abs(frame - other)]
                if config.sink and other == 0:
                    reach = size
                if reach >= 0:
                    low = max(0, first - reach)
                    high = min(size, first + count + reach)
                    keys += range(other * size + low, other * size + high)
            tiles.append((list(range(frame * size + first, frame * size + first + count)), keys))
    return tiles


def _tiles_of_blocks(config: Radial.Config, sides: tuple[int, int]) -> list[Tile]:
    assert config.block is not None
    tokens = sides[0] * sides[1]
    visible = visible_blocks(config, sides)
    count = min(config.block, tokens)
    tiles = []
    for start in range(0, tokens, count):
        # The last tile begins in the block before, where blocks do not divide the video.
        first = min(start, tokens - count)
        rows = visible[first // config.block : (first + count - 1) // config.block + 1]
        keys = []
        for other in range(len(visible)):
            if any(row[other] for row in rows):
                keys += range(other * config.block, min((other + 1) * config.block, tokens))
        tiles.append((list(range(first, first + count)), keys))
    return tiles


_cached_tiling = functools.lru_cache(maxsize=64)(_make_tiling)


def _find_tiling(config: Radial.Config, sides: tuple[int, int], others: int, device: torch.device) -> Tiling:
    # `constant` takes plain functions, which a cache is not.
    return _cached_tiling(config, sides, others, device)
