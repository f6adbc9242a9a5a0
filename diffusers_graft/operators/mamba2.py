"""Mamba-2, a selective state space: every head has a state that decays as the token says; linear in tokens.

Papers: Transformers are SSMs, arXiv 2405.21060, Section 7 (the block); Exploring Diffusion Transformer Designs via
Grafting, arXiv 2506.05340, Table 4; Hydra, arXiv 2407.09941 (both directions as one matrix, with projections in
common).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context, Grid
from ..core.shapes import TokenTensor
from ..core.sites import AttentionSite, Site
from ..errors import OperatorError, UnknownNameError
from .base import AttentionOperator
from .ops.backends import HALF, Backend, WithBackends, compute_dtype
from .ops.opaque import call_kernel
from .ops.scans import ORDERS, decay_start, pad_to_chunks, state_space, visits
from .ops.settings import require_count, require_flag

EPSILON = 1e-5  # of the norm, beside a mean of squares

# What gates an output and normalises it: the output in the state's precision [B, N, D], the gate -> [B, N, D].
Normalise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# A recurrence: value [B, N, heads, P], key and query [B, N, S], step [B, N, heads] -> as value.
Scan = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _ssd(value, step, rate, key, query, *, size: int) -> torch.Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(value, step, rate, key, query, size)


def _gated_norm(mixed, gate, weight, *, size: int) -> torch.Tensor:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(mixed, weight, None, z=gate, eps=EPSILON, norm_before_gate=False)


def _mamba_ssm(operator: Mamba2, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
    held = compute_dtype(hidden_states)
    # The kernel wants decays in float32, and chunks of 16 tokens at least.
    rate = -operator.A_log.float().exp()
    chunk = max(16, operator.config.chunk)

    def scan_one_way(value, key, query, step):
        parts = value.contiguous(), step, rate, key[:, :, None], query[:, :, None]
        return call_kernel(_ssd, *parts, size=chunk)

    def scan(value, key, query, step):
        # The kernel multiplies in the precision of its tensors, and adds its state up in float32.
        parts = value.to(held), key.to(held), query.to(held), step
        mixed = scan_one_way(*parts)
        if operator.config.bidirectional:
            # It goes one way only: for the other it runs on turned tokens.
            mixed = mixed + scan_one_way(*(part.flip(1) for part in parts)).flip(1)
            mixed = mixed - _count_itself(value, key, query, step)
        return mixed.to(value.dtype)

    def normalise(mixed, gate):
        # In float32 and rounded once, gate and norm in one pass.
        weight = operator.norm.weight
        return call_kernel(_gated_norm, mixed.contiguous(), gate.to(mixed.dtype), weight).to(hidden_states.dtype)

    return operator.run(hidden_states, context, scan, normalise)


class Mamba2(WithBackends, AttentionOperator):
    """Parameters have the names and shapes of `mamba_ssm.Mamba2`, in one direction as in both.

    In both directions the convolution is centred, and a token sees those before it through a state from the left and
    those after it through a state from the right, with the same projections and decays. The state is held in float32
    whatever the inputs' precision.
    """

    backends = (Backend("mamba_ssm", _mamba_ssm, "mamba_ssm.ops.triton.ssd_combined", dtypes=(*HALF, torch.float32)),)
    paper = "Transformers are SSMs, arXiv 2405.21060"
    start = "random projections: nothing of the replaced attention stays"
    output_layer = "out_proj"

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the block; the paper on grafting takes `bidirectional=False` and the rest as it is here.

        Attributes:
            state: width of the state's keys (S).
            expand: inner width over the width of a token.
            conv: taps of the depthwise convolution over tokens.
            head_width: channels of a head (P); None means 16, or the most below it that divides the inner width.
            bidirectional: whether tokens see later ones too.
            scan: order in which tokens are visited: `raster`, `column` or `zigzag`, frame by frame.
            chunk: tokens computed at once; changes speed and memory, not results: 32 suits narrow heads, 64 wide ones.
            backend: `torch`, `auto` or `mamba_ssm`.
        """

        state: int = 64
        expand: int = 2
        conv: int = 4
        head_width: int | None = None
        bidirectional: bool = True
        scan: str = "raster"
        chunk: int = 32

        def __post_init__(self):
            super().__post_init__()
            require_count("mamba2", "state", self.state, example=64)
            require_count("mamba2", "expand", self.expand, example=2)
            require_count("mamba2", "conv", self.conv, example=4)
            require_count("mamba2", "chunk", self.chunk, most=1024, example=32)
            require_flag("mamba2", "bidirectional", self.bidirectional)
            if self.head_width is not None:
                require_count("mamba2", "head_width", self.head_width, example=16)
            if self.scan not in ORDERS:
                raise UnknownNameError("scan of mamba2", self.scan, ORDERS)

        def resolved(self, site: Site) -> Mamba2.Config:
            inner = self.expand * site.width
            if self.head_width is None:
                return replace(self, head_width=next(width for width in range(16, 0, -1) if inner % width == 0))
            if inner % self.head_width:
                raise OperatorError(
                    f"mamba2: heads of {self.head_width} do not divide the inner width of {site.path}, which is "
                    f"{self.expand} * {site.width} = {inner}. Choose a head_width that does, or leave it out."
                )
            return self

    def __init__(self, config: Config, site: AttentionSite):
        config = config.resolved(site)
        super().__init__(config, site)
        self.inner = config.expand * site.width
        assert config.head_width is not None
        self.heads = self.inner // config.head_width
        channels = self.inner + 2 * config.state
        # Names, shapes and order are those of mamba_ssm, whose checkpoints load.
        self.in_proj = nn.Linear(site.width, self.inner + channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.conv, groups=channels)
        step_bias, log_rate = decay_start(self.heads)
        self.dt_bias = nn.Parameter(step_bias)
        self.A_log = nn.Parameter(log_rate)
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.inner, eps=EPSILON)
        self.out_proj = nn.Linear(self.inner, site.width, bias=False)
        self.needs_grid = config.scan != "raster"
        self.causal_operator = not (config.bidirectional or self.needs_grid)

    def in_torch(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        return self.run(hidden_states, context, self.scan_chunks)

    def reference(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        """Compute by definition: token by token."""
        return self.run(hidden_states, context, self.scan_tokens)

    def run(
        self, hidden_states: torch.Tensor, context: Context, scan: Scan, normalise: Normalise | None = None
    ) -> torch.Tensor:
        """Compute the block, [B, N, D] in and out, with `scan` for its recurrence and `normalise` for its end."""
        if not self.needs_grid:
            return self.out_proj(self._run_block(hidden_states, scan, normalise))
        grid = context.require_grid(self.name, hidden_states.shape[1])
        order = visits(grid, self.config.scan, hidden_states.device)
        mixed = self._run_block(hidden_states[:, order], scan, normalise)
        # Back in raster order before the last layer, which is solved for in that order.
        return self.out_proj(mixed[:, order.argsort()])

    def _run_block(self, hidden_states: torch.Tensor, scan: Scan, normalise: Normalise | None) -> torch.Tensor:
        """Run the Mamba-2 block up to its output projection, on tokens in the order of the scan."""
        # A state in half precision forgets what is small beside it.
        precise = torch.promote_types(hidden_states.dtype, torch.float32)
        state = self.config.state
        gate, mixed, step = self.in_proj(hidden_states).split(
            [self.inner, self.conv1d.in_channels, self.heads], dim=-1
        )
        mixed = F.silu(self._convolve(mixed)).to(precise)
        value, key, query = mixed.split([self.inner, state, state], dim=-1)
        value = value.unflatten(-1, (self.heads, -1))
        step = F.softplus(step.to(precise) + self.dt_bias)
        mixed = scan(value, key, query, step) + value * self.D[:, None]
        if normalise is not None:
            return normalise(mixed.flatten(2), gate)
        mixed = mixed.flatten(2) * F.silu(gate.to(precise))
        return self.norm(mixed.to(hidden_states.dtype))

    def _convolve(self, tokens: torch.Tensor) -> torch.Tensor:
        """Convolve [B, N, channels] depthwise, as an image one token wide whose channels stay last: fast on CPUs."""
        taps = self.config.conv
        before = taps - 1
        if self.config.bidirectional:
            before = taps // 2
        image = F.pad(tokens, (0, 0, before, taps - 1 - before)).transpose(1, 2)[..., None]
        image = F.conv2d(image, self.conv1d.weight[..., None], self.conv1d.bias, groups=self.conv1d.groups)
        return image[..., 0].transpose(1, 2)

    def _log_decay(self, step: torch.Tensor) -> torch.Tensor:
        """Log of the decay of each step, [B, N, heads]."""
        return -self.A_log.to(step.dtype).exp() * step

    def scan_chunks(
        self, value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        """Run the recurrence chunk by chunk."""
        settings = {"chunk": self.config.chunk, "bidirectional": self.config.bidirectional}
        return state_space(value * step[..., None], key, query, self._log_decay(step), **settings)

    def scan_tokens(
        self, value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        """Run h_i = decay_i h_(i-1) + k_i step_i v_i, y_i = q_i h_i, each way; a token counts itself once."""
        decay = self._log_decay(step).exp()
        steps = list(zip(*(part.unbind(1) for part in (value * step[..., None], key, query, decay)), strict=True))

        def scan_one_way(steps):
            first_value, first_key, *_ = steps[0]
            state = torch.zeros_like(first_key[:, None, :, None] * first_value[:, :, None])
            for v, k, q, decay in steps:
                state = decay[..., None, None] * state + k[:, None, :, None] * v[:, :, None]
                yield (q[:, None, None] @ state)[:, :, 0]

        mixed = torch.stack(list(scan_one_way(steps)), dim=1)
        if not self.config.bidirectional:
            return mixed
        back = list(scan_one_way(steps[::-1]))
        return mixed + torch.stack(back[::-1], dim=1) - _count_itself(value, key, query, step)

    def receptive_field(self, token: int, grid: Grid) -> Collection[int]:
        if self.config.bidirectional:
            return range(grid.tokens)
        order = visits(grid, self.config.scan).tolist()
        return order[: order.index(token) + 1]

    def flops(self, tokens: int) -> int:
        """Price projections, convolution, and the scan's products within chunks and, each way, with the state."""
        padded, chunk = pad_to_chunks(tokens, self.config.chunk)
        state = self.config.state
        projections = 2 * tokens * self.site.width * (self.in_proj.out_features + self.inner)
        convolution = 2 * self.config.conv * tokens * self.conv1d.in_channels
        within = 2 * padded * chunk * (state + self.inner)
        across = 4 * padded * state * self.inner * (1 + self.config.bidirectional)
        return projections + convolution + within + across + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """Count elementwise work: decays between the tokens of a chunk and of states, gates, and the norm."""
        padded, chunk = pad_to_chunks(tokens, self.config.chunk)
        ways = 1 + self.config.bidirectional
        decays = padded * self.heads * chunk * (2 + ways)
        states = 2 * ways * (padded // chunk) * self.config.state * self.inner
        return decays + states + (10 + 3 * ways) * tokens * self.inner


def _count_itself(value: torch.Tensor, key: torch.Tensor, query: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Compute the part of each token in its own output, which both ways count."""
    return (query * key).sum(-1)[..., None, None] * value * step[..., None]
