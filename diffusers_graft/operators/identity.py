"""No mixing: every token keeps its own value, or nothing. The lower control, and how an attention is removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.context import Context, Grid
from ..core.sites import Site
from ..errors import UnknownNameError
from .base import Mixer

OUTPUTS = ("values", "zero")


class Identity(Mixer):
    """What is left of an attention when its softmax costs nothing: the yardstick of every other mixer's speed."""

    honours_mask = True
    causal_operator = True
    start = "value and output projections keep their pretrained weights"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings.

        Attributes:
            output: `values`, or `zero`, which leaves of the attention only the bias of its output projection.
        """

        output: str = "values"

        def __post_init__(self):
            super().__post_init__()
            if self.output not in OUTPUTS:
                raise UnknownNameError("output of identity", self.output, OUTPUTS)

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        self.unused_inputs = ("input 0", "input 1") if config.output == "values" else ("input 0", "input 1", "input 2")

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        return value.clone() if self.config.output == "values" else torch.zeros_like(value)

    def receptive_field(self, token: int, grid: Grid) -> tuple[int, ...]:
        return (token,) if self.config.output == "values" else ()

    def flops(self, tokens: int) -> int:
        return 0
