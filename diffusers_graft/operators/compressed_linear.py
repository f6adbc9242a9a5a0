"""Linear attention with convolved queries, over keys and values that strided convolutions have compressed.

Paper: EDiT, arXiv 2503.16726 (queries convolved on the grid of tokens, keys and values pooled; beside text, MM-EDiT).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context, Grid
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite
from ..errors import OperatorError, UnknownNameError
from .base import Mixer
from .ops.backends import autocast_device
from .ops.depthwise import count_pooled, heads_first, tokens_last
from .ops.features import LEAST, features_of
from .ops.settings import require_count, require_flag

SHARES = ("softmax", "tokens")


class CompressedLinear(Mixer):
    """A video is convolved frame by frame. Beyond the grid its border is repeated, so that averages stay averages.

    The queries' convolution reads the hidden states and narrows them; what it gives is added to the projected queries,
    where in the paper it passes the projection too.
    """

    needs_grid = True
    paper = "EDiT: Efficient Diffusion Transformers with Linear Compressed Attention, arXiv 2503.16726"
    start = (
        "projections keep their pretrained weights; keys and values start as averages of the tokens they stand for, "
        "and the convolution of queries adds nothing"
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings of the convolutions.

        Attributes:
            stride: side of the square of tokens that become one key.
            kernel: taps of the keys' and values' convolutions along each axis, as many as the stride or more.
            query_conv: whether queries are convolved on the grid.
            narrow: width of a token over that within the queries' convolution. The paper's is not known; 64 keeps a
                mixer below a hundredth of its model's parameters.
            text_share: share of an image token's output that a prompt's tokens get: `softmax`, what softmax over both
                would give them (the rule of this library), or `tokens`, their share of all tokens (MM-EDiT).
        """

        stride: int = 2
        kernel: int = 3
        query_conv: bool = True
        narrow: int = 64
        text_share: str = "softmax"

        def __post_init__(self):
            super().__post_init__()
            require_count("compressed_linear", "stride", self.stride, example=2)
            require_count("compressed_linear", "kernel", self.kernel, example=3)
            if self.kernel < self.stride:
                raise OperatorError(
                    f"compressed_linear: kernel {self.kernel} leaves out tokens between strides of {self.stride}. "
                    f"Choose a kernel of {self.stride} or more."
                )
            require_flag("compressed_linear", "query_conv", self.query_conv)
            require_count("compressed_linear", "narrow", self.narrow, example=64)
            if self.text_share not in SHARES:
                raise UnknownNameError("text_share of compressed_linear", self.text_share, SHARES)

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        self.needs_hidden_states = config.query_conv
        width = site.inner_width
        kernel = config.kernel
        self.key_convolution = nn.Conv2d(width, width, kernel, config.stride, groups=width)
        self.value_convolution = nn.Conv2d(width, width, kernel, config.stride, groups=width)
        self.query_convolution = None
        if config.query_conv:
            narrow = max(1, site.width // config.narrow)
            # One group: what is narrowed has few channels, and no heads to keep apart.
            self.query_convolution = nn.Sequential(
                nn.Conv2d(site.width, narrow, 3, padding=1),
                nn.GroupNorm(1, narrow),
                nn.LeakyReLU(),
                nn.Conv2d(narrow, width, 1),
            )

    @torch.no_grad()
    def init_from(self, original: nn.Module) -> None:
        for convolution in (self.key_convolution, self.value_convolution):
            # An average over the kernel, of keys and of values alike.
            nn.init.constant_(convolution.weight, self.config.kernel**-2)
            nn.init.zeros_(convolution.get_parameter("bias"))
        if self.query_convolution is not None:
            nn.init.zeros_(self.query_convolution[-1].get_parameter("weight"))
            nn.init.zeros_(self.query_convolution[-1].get_parameter("bias"))

    def forward(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        grid = context.require_grid(self.name, query.shape[2])
        precise = torch.promote_types(query.dtype, torch.float32)
        query_features = features_of("relu", self._convolve_query(query, grid, context)).to(precise)
        pooled_key = self.key_convolution(self._pad_image(key, grid))
        pooled_value = self.value_convolution(self._pad_image(value, grid))
        key_features = features_of("relu", self._split_heads(pooled_key, len(key))).to(precise)
        values = self._split_heads(pooled_value, len(key)).to(precise)
        # Sums over keys would be spoilt by a short mantissa.
        with torch.autocast(autocast_device(key), enabled=False):
            state = key_features.transpose(-1, -2) @ values
            weight = query_features @ key_features.sum(-2)[..., None]
            mixed = (query_features @ state) / weight.clamp(min=LEAST)
        return mixed.to(value.dtype)

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute by definition: all N x M weights, normalised row by row; keys and values tap by tap."""
        grid = context.require_grid(self.name, query.shape[2])
        query_features = features_of("relu", self._convolve_query(query, grid, context))
        pooled_key = self._by_taps(self.key_convolution, self._pad_image(key, grid), grid)
        pooled_value = self._by_taps(self.value_convolution, self._pad_image(value, grid), grid)
        key_features = features_of("relu", self._split_heads(pooled_key, len(key)))
        weights = query_features @ key_features.transpose(-1, -2)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=LEAST)
        return weights @ self._split_heads(pooled_value, len(key))

    def _convolve_query(self, query: torch.Tensor, grid: Grid, context: Context) -> torch.Tensor:
        """Add to queries, [B, H, N, E], what the convolution makes of the hidden states."""
        if self.query_convolution is None:
            return query
        assert context.hidden_states is not None
        image = context.hidden_states.reshape(-1, grid.height, grid.width, self.site.width)
        convolved = self.query_convolution(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return query + heads_first(convolved, query).to(query.dtype)

    def _pad_image(self, part: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Lay [B, H, N, E] out as images [B * frames, D, rows, columns], with the border that they need."""
        before = (self.config.kernel - self.config.stride + 1) // 2
        padding = []
        # `pad` takes the last axis first.
        for length in (grid.width, grid.height):
            pooled = -(-length // self.config.stride)
            reach = (pooled - 1) * self.config.stride + self.config.kernel
            padding += [before, max(0, reach - before - length)]
        image = tokens_last(part, grid.height, grid.width).permute(0, 3, 1, 2)
        return F.pad(image, padding, mode="replicate").contiguous(memory_format=torch.channels_last)

    def _split_heads(self, pooled: torch.Tensor, batch: int) -> torch.Tensor:
        """Turn pooled images into heads: [B * frames, D, rows, columns] -> [B, H, M, E]."""
        tokens_first = pooled.permute(0, 2, 3, 1).reshape(batch, -1, pooled.shape[1])
        return tokens_first.unflatten(2, (self.site.heads, -1)).transpose(1, 2)

    def _by_taps(self, convolution: nn.Conv2d, image: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Convolve padded images by definition, tap by tap."""
        stride = self.config.stride
        rows = -(-grid.height // stride)
        columns = -(-grid.width // stride)
        convolved = convolution.get_parameter("bias")[:, None, None]
        for y in range(self.config.kernel):
            for x in range(self.config.kernel):
                seen = image[:, :, y::stride, x::stride][:, :, :rows, :columns]
                convolved = convolved + convolution.weight[:, 0, y, x, None, None] * seen
        return convolved

    def image_share(self, tokens: int, others: int) -> float | None:
        if self.config.text_share == "softmax":
            return None
        return tokens / (tokens + others)

    def flops(self, tokens: int) -> int:
        """Price the convolutions and two products with the state, on the last forward's grid or one that divides."""
        width = self.site.inner_width
        pooled = count_pooled(self.last_grid(tokens), tokens, self.config.stride)
        operations = 4 * self.config.kernel**2 * pooled * width
        if self.query_convolution is not None:
            narrow = max(1, self.site.width // self.config.narrow)
            operations += 2 * tokens * narrow * (9 * self.site.width + width)
        products = 2 * (pooled + tokens) * width * self.site.head_width
        return operations + products + 2 * tokens * width
