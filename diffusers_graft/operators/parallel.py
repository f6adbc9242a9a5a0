"""Blocks side by side: all of them get the same input, and their outputs are merged; depth becomes width.

Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, section 6: W [B_a(h, c); B_b(h, c)] + b.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from ..core.sites import BlockSite, Site
from ..errors import OperatorError, UnknownNameError
from .base import BlockOperator
from .ops.settings import require_flag

MERGES = ("linear", "sum", "gated")


class Parallel(BlockOperator):
    """`h + merge(f_a(h), f_b(h), ...)`, f being what a block adds to its input.

    The blocks run one after the other, on every device: what is halved is the depth, not the work. Warm starts are
    `h + f_a(h) + f_b(h)`, to the last bit, for every merge that can say so. The paper's `W [B_a; B_b] + b`
    (`residual=False`) has the same parameters, but sees h only inside the outputs: it starts as their mean.
    """

    paper = "Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340"
    start = "every block keeps its pretrained weights; the merge adds up what they add to their common input"

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockOperator.Config):
        """Settings.

        Attributes:
            merge: `"linear"` (W in D x 2D, and b), `"sum"` (no parameters), or `"gated"` (a factor for each block and
                channel).
            residual: merge what the blocks add to their input, and add that to it; False merges their outputs, as
                printed in the paper.
            group: of a `block_run`, how many neighbours run side by side; all of them unless given.
        """

        merge: str = "linear"
        residual: bool = True
        group: int | None = None

        def __post_init__(self):
            super().__post_init__()
            if self.merge not in MERGES:
                raise UnknownNameError("merge", self.merge, MERGES)
            require_flag("parallel", "residual", self.residual)
            if self.group is not None and (type(self.group) is not int or self.group < 2):
                raise OperatorError(f"A group holds two blocks or more; got group={self.group!r}.")
            if self.merge != "linear" and (not self.residual or self.init == "random"):
                raise OperatorError(
                    f"merge={self.merge!r} adds to the input and has one start: leave residual and init alone."
                )

        def resolved(self, site: Site) -> Self:
            if isinstance(site, BlockSite) and site.kind == "block_run" and site.blocks > 1:
                return replace(self, group=site.blocks)
            return replace(self, group=None)

    def __init__(self, config: Config, site: BlockSite):
        super().__init__(config, site)
        if site.blocks < 2:
            raise OperatorError(f"{self.name} runs two blocks or more side by side; {site.address} is one.")
        self.merge = nn.ModuleList(_MERGES[config.merge](site.width, site.blocks) for _ in range(site.streams))
        if config.merge == "linear":
            if not config.residual:
                self.unused_inputs = ("input 0",)
            # Set here, since the merge replaces nothing that it could start from.
            if config.init == "warm":
                self._start_as_sum(1.0 if config.residual else 1.0 / site.blocks)

    @torch.no_grad()
    def _start_as_sum(self, factor: float) -> None:
        for layer in self.merge:
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(torch.eye(self.site.width).mul(factor).repeat(1, self.site.blocks))
            layer.bias.zero_()

    def forward(self, hidden_states: torch.Tensor, *outputs_and_context: Any, stream: int = 0) -> torch.Tensor:
        *outputs, _ = outputs_and_context
        merge = self.merge[stream]
        if not self.config.residual:
            return merge(torch.cat(outputs, dim=-1))
        return hidden_states + merge(torch.cat([output - hidden_states for output in outputs], dim=-1))

    def flops(self, tokens: int) -> int:
        if self.config.merge != "linear":
            return 0
        return 2 * tokens * self.site.blocks * self.site.width**2


class _Sum(nn.Module):
    """[B, N, k * D] to [B, N, D]: what k blocks add, added up."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.blocks = blocks

    def forward(self, added: torch.Tensor) -> torch.Tensor:
        # Begun with the first, not with zero, so that the sum is the same to the last bit.
        first, *others = added.chunk(self.blocks, dim=-1)
        return sum(others, first)


class _Gated(_Sum):
    """A sum with a factor for each block and channel, one to begin with."""

    def __init__(self, width: int, blocks: int):
        super().__init__(width, blocks)
        self.gate = nn.Parameter(torch.ones(blocks * width))

    def forward(self, added: torch.Tensor) -> torch.Tensor:
        return super().forward(self.gate * added)


_MERGES = {"linear": lambda width, blocks: nn.Linear(blocks * width, width), "sum": _Sum, "gated": _Gated}
