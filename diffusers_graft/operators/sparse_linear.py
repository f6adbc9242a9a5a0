"""Softmax attention over the blocks of keys that matter, linear attention over the rest, mixed by one learned share.

Papers: SLA, arXiv 2509.24006; SLA2, arXiv 2602.12675 (linear attention over the blocks left out alone, and a learned
mixture); ReHyAt, arXiv 2601.04342 (softmax nearby, linear elsewhere).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context, Grid
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import UnknownNameError
from .base import Mixer
from .ops.backends import autocast_device
from .ops.blocks import (
    BlockConfig,
    Cut,
    attend_chosen,
    chosen_pairs,
    count_blocks,
    cut_into_blocks,
    join_blocks,
    nearest_blocks,
    pairs_of_tokens,
)
from .ops.features import LEAST, features_of

CHOICES = ("scores", "nearest")
FEATURE_MAPS = ("softmax", "elu", "relu")


class SparseLinear(Mixer):
    """A query sees its kept blocks as softmax does, and one key more, which stands for all blocks that are left out.

    That key's value is what linear attention over those blocks gives the query. Its score is log Z of them as pooled
    queries and keys estimate it, Z being the sum of exponentials, plus one learned number for each head that starts at
    zero: so linear attention starts with the share that softmax itself would give to what is left out, and with none
    where all blocks are kept. A prompt's keys are in the same softmax.
    """

    needs_grid = True
    honours_others = True
    ignores_attention_backend = True
    exact_with = "every block kept"
    idle_parameters = ("log_share",)  # where every block is kept, nothing is left out
    paper = "SLA2: Sparse-Linear Attention with Learnable Routing and QAT, arXiv 2602.12675"
    start = "projections keep their pretrained weights; linear attention starts with softmax's own share of its keys"

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Settings of the two parts.

        Attributes:
            block: side of a block in tokens, a square of images and a cube of videos; of videos also (frames, height,
                width).
            keep: blocks of keys under softmax, for each block of queries: a count, or a share above 0 and up to 1.
            choose: the blocks that are kept: those of the largest pooled `"scores"` (SLA), or the `"nearest"` on the
                grid of blocks, the block itself first (ReHyAt, with whole frames as blocks).
            feature_map: of linear attention: `softmax` over channels (the paper), `elu` or `relu`.
        """

        choose: str = "scores"
        feature_map: str = "softmax"

        def __post_init__(self):
            super().__post_init__()
            if self.choose not in CHOICES:
                raise UnknownNameError("choose of sparse_linear", self.choose, CHOICES)
            if self.feature_map not in FEATURE_MAPS:
                raise UnknownNameError("feature map of sparse_linear", self.feature_map, FEATURE_MAPS)

        @property
        def papers(self) -> tuple[str, ...]:
            return super().papers if self.choose == "scores" else (*super().papers, "ReHyAt, arXiv 2601.04342")

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        # Added to log Z of the blocks that are left out.
        self.log_share = nn.Parameter(torch.zeros(site.heads))

    def forward(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        cut = cut_into_blocks(self, query, key, value, context)
        chosen = self._choose(cut, context)
        is_left_out = ~chosen_pairs(chosen, cut.scores.shape[-1])
        log_rest = self._log_rest(cut, is_left_out).to(query.dtype)
        # One more channel, which only the key of the rest has, comes out as its weight; seven more, since kernels want
        # widths in steps of eight.
        # Not `dataclasses.replace`, which older torch cannot compile.
        padded = Cut(
            blocks=cut.blocks,
            query=F.pad(cut.query, (0, 8)),
            key=F.pad(cut.key, (0, 8)),
            value=F.pad(cut.value, (0, 8)),
            bias=cut.bias,
            visible=cut.visible,
            count=cut.count,
            scores=cut.scores,
            others=cut.others,
            scale=cut.scale,
        )
        mixed = attend_chosen(padded, chosen, extra=self._add_rest(cut, log_rest))
        softmax, weight, _ = mixed.split([query.shape[-1], 1, 7], dim=-1)
        return join_blocks(softmax + weight * self._attend_rest(cut, is_left_out), cut.blocks)

    def _choose(self, cut: Cut, context: Context) -> torch.Tensor:
        """Return the kept blocks of each block of queries, [B, H, n, K]."""
        n = cut.scores.shape[-1]
        kept = self.config.kept_of(n)
        if self.config.choose == "scores":
            return cut.scores.detach().topk(kept, dim=-1).indices
        grid = context.require_grid(self.name, cut.blocks.inverse.size(0))
        nearest = nearest_blocks(self.config, grid, kept, cut.scores.device)
        return nearest.expand(*cut.scores.shape[:2], n, kept)

    def _log_rest(self, cut: Cut, is_left_out: torch.Tensor) -> torch.Tensor:
        """Return the score of the rest for each block of queries, [B, H, n, 1]."""
        of_block = cut.scores + cut.count.log()[:, :, None]
        # Finite, so that a rest of nothing has no share and a gradient that is defined.
        lowest = torch.finfo(of_block.dtype).min / 2
        log_rest = of_block.masked_fill(~is_left_out, lowest).logsumexp(-1, keepdim=True)
        return log_rest + self.log_share[:, None, None]

    def _add_rest(self, cut: Cut, log_rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Put the key of the rest before the others, all with eight channels more."""
        others_key, others_value, others_bias = cut.others
        batch, heads, others, width = others_key.shape
        rest_key = others_key.new_zeros(batch, heads, 1, width + 8)
        rest_value = F.pad(others_key.new_ones(batch, heads, 1, 1), (width, 7))
        key = torch.cat([rest_key, F.pad(others_key, (0, 8))], dim=2)
        value = torch.cat([rest_value, F.pad(others_value, (0, 8))], dim=2)
        if others_bias is None:
            others_bias = log_rest.new_zeros(1)
        bias = others_bias.expand(batch, heads, cut.key.shape[2], others)
        return key, value, torch.cat([log_rest, bias], dim=-1)

    def _attend_rest(self, cut: Cut, is_left_out: torch.Tensor) -> torch.Tensor:
        """Compute linear attention over the blocks that are left out, [B, H, n, b, E]."""
        precise = cut.scores.dtype
        key_features = features_of(self.config.feature_map, cut.key.to(precise))
        if cut.visible is not None:
            key_features = key_features * cut.visible[..., None]
        query_features = features_of(self.config.feature_map, _scaled(cut, cut.query).to(precise))
        # Sums over tokens would be spoilt by a short mantissa.
        with torch.autocast(autocast_device(cut.key), enabled=False):
            state = key_features.transpose(-1, -2) @ cut.value.to(precise)
            # The normaliser is one more column of the state, so that one product reads both.
            state = torch.cat([state, key_features.sum(3)[..., None]], dim=-1)
            # Added up over what is left out, not subtracted from the total, which would leave its rounding behind.
            state = (is_left_out.to(precise) @ state.flatten(3)).view(state.shape)
            mixed, weight = (query_features @ state).split([cut.value.shape[-1], 1], dim=-1)
            return (mixed / weight.clamp(min=LEAST)).to(cut.value.dtype)

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute by definition: two matrices of weights over all pairs of tokens, and their shares."""
        cut = cut_into_blocks(self, query, key, value, context)
        tokens = query.shape[2]
        is_chosen = chosen_pairs(self._choose(cut, context), cut.scores.shape[-1])
        visible = pairs_of_tokens(is_chosen, cut.blocks, key.shape[2] - tokens)
        lowest = torch.finfo(query.dtype).min / 2
        scores = (cut.scale * query @ key.transpose(-1, -2)).masked_fill(~visible, lowest)
        if context.mask is not None and context.mask.dtype == torch.bool:
            scores = scores.masked_fill(~context.mask, lowest)
        elif context.mask is not None:
            scores = scores + context.mask
        features = [features_of(self.config.feature_map, part) for part in (_scaled(cut, query), key[:, :, :tokens])]
        linear = (features[0] @ features[1].transpose(-1, -2)).masked_fill(visible[..., :tokens], 0)
        linear = linear / linear.sum(-1, keepdim=True).clamp(min=LEAST)
        block = cut.blocks.inverse // cut.blocks.places.size(1)
        log_rest = self._log_rest(cut, ~is_chosen)[:, :, block]
        share = (log_rest - scores.logsumexp(-1, keepdim=True)).sigmoid()
        return (1 - share) * (scores.softmax(-1) @ value) + share * (linear @ value[:, :, :tokens])

    def receptive_field(self, token: int, grid: Grid) -> range:
        return range(grid.tokens)

    def flops(self, tokens: int) -> int:
        """Price scores of blocks, softmax over the kept ones and the rest's key, and states of linear attention."""
        n, size = count_blocks(self.config, self.last_grid(tokens), tokens)
        heads = self.site.heads
        width = self.site.head_width
        seen = self.config.kept_of(n) * size + 1
        softmax = 2 * n * n * heads * width + 4 * n * size * seen * heads * (width + 8)
        states = 2 * n * size * heads * width * width + 2 * n * n * heads * width * (width + 1)
        reading = 2 * n * size * heads * width * (width + 1)
        return softmax + states + reading


def _scaled(cut: Cut, query: torch.Tensor) -> torch.Tensor:
    """Return queries whose products have the scale that softmax usually gives them, which features know nothing of."""
    return query * (cut.scale * query.shape[-1] ** 0.5)
