"""Nothing in place of blocks: depth pruning. What enters them is what leaves them.

Paper: the depth-pruned baselines of TinyFusion, arXiv 2412.01199.
"""

from __future__ import annotations

from typing import Any

import torch

from .base import BlockOperator


class Remove(BlockOperator):
    """Nothing in place of blocks: it has nothing to learn, and leaves no weights in saved files."""

    paper = "TinyFusion: Diffusion Transformers Learned Shallow, arXiv 2412.01199"
    start = "the identity, which is all it is"
    runs_blocks = False

    def forward(self, hidden_states: torch.Tensor, *outputs_and_context: Any, stream: int = 0) -> torch.Tensor:
        return hidden_states

    def flops(self, tokens: int) -> int:
        return 0
