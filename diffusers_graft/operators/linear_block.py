"""One linear map in place of what blocks add to their input: the step between a block and none.

Paper: the replacement of blocks by linear maps fitted to them, "Your Transformer is Secretly Linear", arXiv
2405.12250.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core.sites import BlockSite
from .base import BlockOperator, OperatorConfig


class LinearBlock(BlockOperator):
    """`h + W h + b`, of each stream by itself: tokens no longer see each other, nor the timestep."""

    paper = "Your Transformer is Secretly Linear, arXiv 2405.12250"
    start = "the identity, as if the blocks were removed"
    runs_blocks = False

    def __init__(self, config: OperatorConfig, site: BlockSite):
        super().__init__(config, site)
        self.linear = nn.ModuleList(nn.Linear(site.width, site.width) for _ in range(site.streams))
        # Set here, since nothing of the blocks is there to start from.
        if config.init == "warm":
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    def forward(self, hidden_states: torch.Tensor, *outputs_and_context: Any, stream: int = 0) -> torch.Tensor:
        return hidden_states + self.linear[stream](hidden_states)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.site.width**2
