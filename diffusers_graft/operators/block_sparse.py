"""Softmax attention over the blocks of keys that matter: pooled queries and keys choose them, block by block.

Papers: VSA, arXiv 2505.13389 (tiles of the video as blocks, and the pooled attention as a coarse branch of its own);
NABLA, arXiv 2507.13546 (blocks up to a share of the pooled mass).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..core.context import Context
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import OperatorError, UnknownNameError
from .base import Mixer
from .ops.backends import HALF, Backend, WithBackends, has_mask_or_others
from .ops.blocks import (
    BlockConfig,
    Cut,
    attend_chosen,
    attend_chosen_in_triton,
    count_blocks,
    cut_into_blocks,
    join_blocks,
    mean_of_blocks,
    pairs_of_tokens,
)
from .ops.tiles import masked_softmax

GATES = ("channel", "token")


def _triton(operator: BlockSparse, query, key, value, context: Context) -> torch.Tensor:
    return operator.mix(query, key, value, context, attend_chosen_in_triton)


class BlockSparse(WithBackends, Mixer):
    """One exact softmax over the kept keys, the same for all queries of a block; with all kept, softmax attention.

    Scores of blocks are products of mean queries and mean keys; choosing has no gradient. A prompt's keys are always
    kept, in the same softmax.
    """

    backends = (Backend("triton", _triton, "triton", dtypes=(*HALF, torch.float32)),)
    needs_grid = True
    chooses_tokens = True
    ignores_attention_backend = True
    exact_with = "every block kept, and the gate closed"
    paper = "VSA: Faster Video Diffusion with Trainable Sparse Attention, arXiv 2505.13389"
    start = "projections keep their pretrained weights; with a gate, the coarse branch starts closed (zero)"

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config, BlockConfig):
        """Settings of the choice.

        Attributes:
            block: side of a block in tokens, a square of images and a cube of videos; of videos also (frames, height,
                width).
            keep: blocks of keys that each block of queries sees: a count, or a share of all above 0 and up to 1.
            mass: leaves out kept blocks beyond those that hold this share of the pooled softmax; None leaves out none.
            gate: adds the pooled attention itself, one output for a block, times a gate that starts at zero:
                `"channel"`, one number for each channel, or `"token"`, a linear map of the hidden states (VSA). None
                adds nothing.
            backend: `torch`, `auto` or `triton`.
        """

        mass: float | None = None
        gate: str | None = None

        def __post_init__(self):
            super().__post_init__()
            if self.gate is not None and self.gate not in GATES:
                raise UnknownNameError("gate of block_sparse", self.gate, GATES)
            is_share = type(self.mass) is float and 0 < self.mass < 1
            if self.mass is not None and not is_share:
                raise OperatorError(
                    "block_sparse: mass is a share of the pooled softmax between 0 and 1, or None; "
                    f"got {self.mass!r}. Try 0.9."
                )

        @property
        def papers(self) -> tuple[str, ...]:
            return super().papers if self.mass is None else (*super().papers, "NABLA, arXiv 2507.13546")

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        # Pooled attention is no part of the one softmax that other keys share and that masks are for.
        self.honours_others = config.gate is None
        self.honours_mask = config.gate is None and config.backend in ("torch", "auto")
        self.needs_hidden_states = config.gate == "token"
        self.gate = None
        self.gate_projection = None
        if config.gate == "channel":
            self.gate = nn.Parameter(torch.zeros(site.heads, 1, site.head_width))
        if config.gate == "token":
            self.gate_projection = nn.Linear(site.width, site.inner_width)
            nn.init.zeros_(self.gate_projection.weight)
            nn.init.zeros_(self.gate_projection.bias)

    def is_for_torch(self, inputs: Sequence[torch.Tensor], context: Context) -> bool:
        # A kernel knows its blocks and no more.
        return has_mask_or_others(inputs, context)

    def in_torch(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        return self.mix(query, key, value, context, attend_chosen)

    def mix(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: Context,
        attend: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Compute the output with `attend(cut, chosen, dropped=...)`, as `attend_chosen`, for its softmax."""
        if self._sees_all(query, context):
            return context.attend(query, key, value, mask=context.mask, scale=context.scale)
        cut = cut_into_blocks(self, query, key, value, context)
        # Softmax keeps the order of scores, and is what both the mass and the coarse branch are made of.
        weights = cut.scores.softmax(-1)
        kept = self.config.kept_of(cut.scores.shape[-1])
        largest, chosen = weights.detach().topk(kept, dim=-1)
        dropped = None
        if self.config.mass is not None:
            # By the mass before each block: the one that reaches the share is kept, and so always the first.
            dropped = largest.cumsum(-1) - largest >= self.config.mass
        mixed = join_blocks(attend(cut, chosen, dropped=dropped), cut.blocks).to(value.dtype)
        if self.config.gate is None:
            return mixed
        return mixed + self._open_gate(context) * join_blocks(self._coarse(cut, weights), cut.blocks).to(value.dtype)

    def _sees_all(self, query: torch.Tensor, context: Context) -> bool:
        """Return whether nothing is left out and nothing added, so that softmax itself is computed."""
        grid = context.require_grid(self.name, query.shape[2])
        n, _ = count_blocks(self.config, grid, grid.tokens)
        return self.config.kept_of(n) == n and self.config.mass is None and self.config.gate is None

    def _coarse(self, cut: Cut, weights: torch.Tensor) -> torch.Tensor:
        """Return pooled attention, repeated for the tokens of each block, [B, H, n, b, E]."""
        mean_value = mean_of_blocks(cut.value.to(weights.dtype), cut.visible)
        return (weights @ mean_value)[:, :, :, None].expand(cut.value.shape)

    def _open_gate(self, context: Context) -> torch.Tensor:
        """Return the gate of the coarse branch, [H, 1, E] or [B, H, N, E]."""
        if self.gate is not None:
            return self.gate
        assert self.gate_projection is not None
        assert context.hidden_states is not None
        gate = self.gate_projection(context.hidden_states)
        return gate.unflatten(-1, (self.site.heads, -1)).transpose(1, 2)

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute by definition: softmax over all pairs of tokens, under a mask of those in chosen pairs of blocks."""
        cut = cut_into_blocks(self, query, key, value, context)
        weights = cut.scores.softmax(-1)
        # A block is chosen where fewer blocks than are kept weigh more, and those weigh less than the mass.
        larger = weights[..., None, :] > weights[..., :, None]
        chosen = larger.sum(-1) < self.config.kept_of(weights.shape[-1])
        if self.config.mass is not None:
            chosen = chosen & ((weights[..., None, :] * larger).sum(-1) < self.config.mass)
        visible = pairs_of_tokens(chosen, cut.blocks, key.shape[2] - query.shape[2])
        mixed = masked_softmax(query, key, value, visible, scale=context.scale, mask=context.mask)
        if self.config.gate is None:
            return mixed
        return mixed + self._open_gate(context) * join_blocks(self._coarse(cut, weights), cut.blocks)

    def flops(self, tokens: int) -> int:
        """Price scores of blocks, softmax over the kept ones, and the coarse branch, on the last forward's grid."""
        n, size = count_blocks(self.config, self.last_grid(tokens), tokens)
        width = self.site.inner_width
        kept = self.config.kept_of(n)
        if kept == n and self.config.mass is None and self.config.gate is None:
            return 4 * tokens * tokens * width
        operations = 2 * n * n * width + 4 * n * size * kept * size * width
        if self.config.gate is not None:
            operations += 2 * n * n * width
        if self.gate_projection is not None:
            operations += 2 * tokens * self.site.width * width
        return operations
