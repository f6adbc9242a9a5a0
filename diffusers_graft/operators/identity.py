"""No mixing: every token passes its value on, or nothing. The lower control, and how an attention is removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.context import Context, Grid
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import UnknownNameError
from .base import Mixer

OUTPUTS = ("values", "zero")


class Identity(Mixer):
    """An attention whose softmax costs nothing: the yardstick of every other mixer's speed."""

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

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        self.unused_inputs = ("input 0", "input 1")
        if config.output == "zero":
            self.unused_inputs = ("input 0", "input 1", "input 2")

    def forward(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        if self.config.output == "zero":
            return torch.zeros_like(value)
        # A copy, since what follows may write into the output.
        return value.clone()

    def receptive_field(self, token: int, grid: Grid) -> tuple[int, ...]:
        if self.config.output == "zero":
            return ()
        return (token,)

    def flops(self, tokens: int) -> int:
        return 0
