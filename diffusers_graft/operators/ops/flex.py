"""Windows through FlexAttention: torch compiles a kernel that skips the blocks a rule leaves empty.

On CUDA it also trains; on CPU it has a forward alone, and is slower than tiles of softmax there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# (query place, key place) on one axis of a grid -> whether it is seen; elementwise on index tensors.
Sees = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

BLOCK = 128  # tokens of a block, FlexAttention's own choice

_compiled = functools.cache(lambda: torch.compile(flex_attention, dynamic=False))


def mask_of(rule: Callable[..., Sees], axes: tuple[tuple[int, ...], ...]) -> Callable[..., torch.Tensor]:
    """Make the mask function of FlexAttention for a grid: every axis must be seen."""
    sees = [(axis[0], rule(*axis)) for axis in axes]

    def mask(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        visible = query == query
        for length, seen in reversed(sees):
            visible = visible & seen(query % length, key % length)
            query = query // length
            key = key // length
        return visible

    return mask


# Tensors of a BlockMask: which blocks of keys a block of queries sees in part and in full, and the other way round.
_TENSORS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def _seen_blocks(
    rule: Callable[..., Sees], axes: tuple[tuple[int, ...], ...], tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether a block of queries sees a block of keys in part, and in full, [blocks, blocks] each."""
    sees = mask_of(rule, axes)
    count = -(-tokens // BLOCK)
    keys = torch.arange(count * BLOCK, device=device)
    nothing = torch.tensor(0, device=device)
    some = []
    full = []
    # One row of blocks at a time: all pairs of 32,768 tokens would take gigabytes.
    for start in range(0, tokens, BLOCK):
        queries = keys[start : start + BLOCK, None]
        visible = sees(nothing, nothing, queries, keys) & (queries < tokens) & (keys < tokens)
        blocks = visible.unflatten(1, (count, BLOCK))
        full.append(blocks.all(2).all(0))
        some.append(blocks.any(2).any(0) & ~full[-1])
    return torch.stack(some), torch.stack(full)


def _list_blocks(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many blocks each sees, and which come first, as a BlockMask has them."""
    ordered = seen.int().argsort(dim=1, descending=True, stable=True)
    return seen.sum(1, dtype=torch.int32)[None, None], ordered.int()[None, None]


@functools.lru_cache(maxsize=64)
def _make_blocks(
    rule: Callable[..., Sees], axes: tuple[tuple[int, ...], ...], tokens: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    # Blocks outlive the mode they are made in, and inference tensors could never be trained with.
    with torch.inference_mode(False):
        seen = _seen_blocks(rule, axes, tokens, device)
        lists = []
        for blocks in (*seen, *(part.T for part in seen)):
            lists += _list_blocks(blocks)
        return tuple(lists)


@torch.compiler.assume_constant_result
def _blocks(
    rule: Callable[..., Sees], axes: tuple[tuple[int, ...], ...], tokens: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Find the blocks of a grid, once; compiled code holds them as constants."""
    return _make_blocks(rule, axes, tokens, device)


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Callable[..., Sees],
    axes: tuple[tuple[int, ...], ...],
    scale: float | None,
) -> torch.Tensor:
    """Compute softmax attention over the keys a rule lets each query see: [B, H, N, E] in and out."""
    tokens = query.shape[2]
    blocks = dict(zip(_TENSORS, _blocks(rule, axes, tokens, query.device), strict=True))
    sides = (BLOCK, BLOCK)
    mask = BlockMask(seq_lengths=(tokens, tokens), BLOCK_SIZE=sides, mask_mod=mask_of(rule, axes), **blocks)
    # Within compiled code it is compiled along; alone it would compute all pairs.
    call = flex_attention if torch.compiler.is_compiling() else _compiled()
    return call(query, key, value, block_mask=mask, scale=scale)
