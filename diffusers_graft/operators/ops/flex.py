"""Windows through FlexAttention: torch compiles a kernel that skips the blocks a rule leaves empty.

On CUDA it also trains; on CPU it has a forward alone, and is slower than tiles of softmax there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# (query place, key place) on one axis of a grid -> whether it is seen; elementwise on index tensors.
Sees = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_compiled = functools.cache(lambda: torch.compile(flex_attention, dynamic=False))


def mask_of(rule: Callable[..., Sees], axes: tuple[tuple[int, ...], ...]) -> Callable[..., torch.Tensor]:
    """The mask function of FlexAttention for a grid: every axis must be seen."""
    sees = [(axis[0], rule(*axis)) for axis in axes]

    def mask(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        visible = query == query
        for length, seen in reversed(sees):
            visible = visible & seen(query % length, key % length)
            query, key = query // length, key // length
        return visible

    return mask


@functools.lru_cache(maxsize=64)
def _block_mask(rule: Callable[..., Sees], axes: tuple[tuple[int, ...], ...], tokens: int, device: str) -> BlockMask:
    return create_block_mask(mask_of(rule, axes), None, None, tokens, tokens, device=device)


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Callable[..., Sees],
    axes: tuple[tuple[int, ...], ...],
    scale: float | None,
) -> torch.Tensor:
    """Softmax attention over the keys a rule lets each query see: [B, H, N, E] in and out."""
    call = flex_attention if torch.compiler.is_compiling() else _compiled()
    return call(query, key, value, block_mask=_block_mask(rule, axes, query.shape[2], query.device.type), scale=scale)
