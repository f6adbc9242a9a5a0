"""Gated DeltaNet: a state in which each key writes over what it recalls, and which decays as the token says; linear in
tokens.

Papers: Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464; Kimi Linear, arXiv 2510.26692 (Kimi
Delta Attention: a decay for each channel of the keys).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context
from ..core.shapes import TokenTensor
from ..core.sites import AttentionSite
from ..errors import OperatorError, UnknownNameError
from .base import AttentionOperator, Projections, rare
from .ops.backends import Backend, WithBackends, compute_dtype
from .ops.depthwise import Convolve, ShortConvolution, ShortConvolutions
from .ops.opaque import call_kernel
from .ops.scans import FEW, count_pair_products, decay_start, gated_delta_rule, pad_to_chunks
from .ops.settings import require_count, require_flag

DECAYS = ("head", "channel")
GATES = ("silu", "sigmoid")

# The number whose SiLU is one.
SILU_OF_ONE = 1.2784645427610738


def _fla_rule(value, query, key, log_decay, strength, *, size: int) -> torch.Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    mixed, _ = chunk_gated_delta_rule(query, key, value, g=log_decay, beta=strength, scale=1.0)
    return mixed


def _fla(operator: GatedDeltanet, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
    # Heads are rows of the batch: [B, N, H, E] with one head. The kernel multiplies in half precision, and adds up
    # strengths and decays in float32.
    held = compute_dtype(hidden_states)
    *parts, strength, log_decay = (part[:, :, None] for part in operator.project(hidden_states))
    parts = [part.to(held) for part in parts]
    outputs = []
    for backwards in operator.directions():
        turned = [part.flip(1) if backwards else part for part in (*parts, strength, log_decay)]
        query, key, value, beta, decay = turned
        # It is closed to torch.compile by its authors.
        mixed = call_kernel(_fla_rule, value, query, key, decay, beta)[:, :, 0]
        outputs.append(mixed.flip(1) if backwards else mixed)
    return operator.project_out(outputs, hidden_states)


class GatedDeltanet(WithBackends, AttentionOperator):
    """Queries and keys are of unit length, so that a query which is a key gives the value last written there.

    That keeps outputs at the scale of values, which is what the pretrained output projection expects. The published
    blocks' short convolutions, output norm and gate are settings: convolutions start as the identity, gates at one,
    and the norm with the size that values have where tokens are standard normal. Both directions have the same
    projections and decays, and their outputs are averaged. The state is held in float32 whatever the inputs'
    precision.
    """

    backends = (Backend("fla", _fla, "fla.ops.gated_delta_rule"),)
    paper = "Gated Delta Networks, arXiv 2412.06464"
    start = (
        "queries, keys, values and output start from the pretrained projections, without norms and rotary embeddings; "
        "decay and strength of writing start random"
    )
    output_layer = "o_proj"

    @dataclass(frozen=True, kw_only=True)
    class Config(WithBackends.Config):
        """Settings of the state.

        Attributes:
            bidirectional: whether tokens see later ones too (the paper: they do not).
            chunk: tokens computed at once; changes speed and memory, not results.
            decay: one for each `head`, or for each `channel` of its keys (Kimi Delta Attention).
            short_conv: taps of depthwise convolutions of queries, keys and values over tokens, centred where later
                tokens are seen; 0 for none (published: 4).
            silu: whether queries and keys pass SiLU behind the convolutions, as published.
            output_norm: whether outputs pass an RMSNorm, head by head.
            output_gate: factor on the outputs that the token says: `silu` (Gated DeltaNet, a full map), `sigmoid`
                (Kimi Delta Attention, a map through the width of a head), or None.
            backend: `torch`, `auto` or `fla`, which has a decay for each head alone.
        """

        bidirectional: bool = True
        chunk: int = 64
        decay: str = rare("head")
        short_conv: int = rare(0)
        silu: bool = rare(False)
        output_norm: bool = rare(False)
        output_gate: str | None = rare(None)

        def __post_init__(self):
            super().__post_init__()
            require_flag("gated_deltanet", "bidirectional", self.bidirectional)
            require_count("gated_deltanet", "chunk", self.chunk, most=1024, example=64)
            if self.decay not in DECAYS:
                raise UnknownNameError("decay of gated_deltanet", self.decay, DECAYS)
            if self.output_gate is not None and self.output_gate not in GATES:
                raise UnknownNameError("output_gate of gated_deltanet", self.output_gate, GATES)
            require_count("gated_deltanet", "short_conv", self.short_conv, least=0, example=4)
            require_flag("gated_deltanet", "silu", self.silu)
            require_flag("gated_deltanet", "output_norm", self.output_norm)
            if self.backend == "fla" and self.decay == "channel":
                raise OperatorError(
                    'gated_deltanet: backend "fla" has one decay for each head, and decay="channel" was asked for. '
                    'Choose backend="torch".'
                )

        @property
        def papers(self) -> tuple[str, ...]:
            return super().papers if self.decay == "head" else (*super().papers, "Kimi Linear, arXiv 2510.26692")

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        # Names are those of flash-linear-attention's layer.
        self.q_proj = nn.Linear(site.width, site.inner_width)
        self.k_proj = nn.Linear(site.width, site.inner_width)
        self.v_proj = nn.Linear(site.width, site.inner_width)
        if config.decay == "head":
            self.a_proj: nn.Module = nn.Linear(site.width, site.heads, bias=False)
        else:
            self.a_proj = _narrow_linear(site, bias=False)
        self.b_proj = nn.Linear(site.width, site.heads, bias=False)
        step_bias, log_rate = decay_start(site.heads)
        if config.decay == "channel":
            step_bias, _ = decay_start(site.inner_width)
        self.dt_bias = nn.Parameter(step_bias)
        self.A_log = nn.Parameter(log_rate)
        self.o_proj = nn.Linear(site.inner_width, site.width)
        self.causal_operator = not config.bidirectional
        # What settings add comes last: the numbers drawn before stay those that they are without it.
        self.convolutions = ShortConvolutions()
        if config.short_conv:
            layout = "centered_1d" if config.bidirectional else "causal_1d"
            for name in ("query", "key", "value"):
                self.convolutions[name] = ShortConvolution(site.inner_width, config.short_conv, layout)
        self.norm_scale = None
        if config.output_norm:
            self.norm_scale = nn.Parameter(torch.ones(site.heads, 1, site.head_width))
        self.g_proj = None
        if config.output_gate == "silu":
            self.g_proj = nn.Linear(site.width, site.inner_width)
        elif config.output_gate == "sigmoid":
            self.g_proj = _narrow_linear(site, bias=True)

    @torch.no_grad()
    def init_from(self, original: Projections) -> None:
        for name in ("query", "key", "value", "out"):
            layer = getattr(self, f"{name[0]}_proj")
            bias = getattr(original, f"{name}_bias")
            layer.weight.copy_(getattr(original, name))
            layer.bias.zero_()
            if bias is not None:
                layer.bias.copy_(bias)
        for convolution in self.convolutions.values():
            convolution.set_identity()
        if self.norm_scale is not None:
            # The size of values whose tokens are standard normal.
            size = (self.v_proj.weight.square().sum(1) + self.v_proj.bias.square()).sqrt()
            self.norm_scale.copy_(size.view(self.norm_scale.shape))
        if self.g_proj is not None:
            self._open_gate()

    def _open_gate(self) -> None:
        """Start the output gate at one for every token."""
        last = self.g_proj
        if isinstance(last, nn.Sequential):
            last = last[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, SILU_OF_ONE if self.config.output_gate == "silu" else 0.0)

    def in_torch(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        return self._scan(hidden_states, ShortConvolution.__call__)

    def countable(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        """Compute without the outputs of convolutions beyond the border, which `forward` drops."""
        return self._scan(hidden_states, ShortConvolution.padded)

    def _scan(self, hidden_states: torch.Tensor, convolve: Convolve) -> torch.Tensor:
        parts = self.project(hidden_states, convolve)
        outputs = [
            gated_delta_rule(*parts, chunk=self.config.chunk, backwards=backwards) for backwards in self.directions()
        ]
        return self.project_out(outputs, hidden_states)

    def reference(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        """Compute by definition: token by token."""
        parts = self.project(hidden_states, ShortConvolution.by_taps)
        outputs = [token_by_token(*parts, backwards=backwards) for backwards in self.directions()]
        return self.project_out(outputs, hidden_states)

    def directions(self) -> tuple[bool, ...]:
        """List for each scan whether it goes backwards."""
        if self.config.bidirectional:
            return (False, True)
        return (False,)

    def project(
        self, hidden_states: torch.Tensor, convolve: Convolve = ShortConvolution.__call__
    ) -> tuple[torch.Tensor, ...]:
        """Compute queries, keys and values [B * H, N, E], strength of writing [B * H, N] and log of the decay.

        That is [B * H, N], or [B * H, N, E].
        """
        # A state in half precision forgets what is small beside it.
        precise = torch.promote_types(hidden_states.dtype, torch.float32)
        projections = [self.q_proj, self.k_proj, self.v_proj, self.b_proj, self.a_proj]
        parts = [projection(hidden_states) for projection in projections]
        for place, convolution in enumerate(self.convolutions.values()):
            parts[place] = convolve(convolution, parts[place][:, :, None])[:, :, 0]
        if self.config.silu:
            # Values keep their sign.
            parts[:2] = [F.silu(part) for part in parts[:2]]
        query, key, value, strength, step = (
            part.to(precise).unflatten(-1, (self.site.heads, -1)).transpose(1, 2).flatten(0, 1) for part in parts
        )
        batch = len(hidden_states)
        log_rate = self.A_log.to(precise).repeat(batch)[:, None]
        if self.config.decay == "head":
            step = step[..., 0]
            bias = self.dt_bias.to(precise).repeat(batch)[:, None]
        else:
            log_rate = log_rate[..., None]
            bias = self.dt_bias.to(precise).view(self.site.heads, 1, -1).repeat(batch, 1, 1)
        log_decay = -log_rate.exp() * F.softplus(step + bias)
        return F.normalize(query, dim=-1), F.normalize(key, dim=-1), value, strength[..., 0].sigmoid(), log_decay

    def project_out(self, outputs: list[torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        """Put the mean of the directions, [B * H, N, E] each, through the output projection: [B, N, D]."""
        # The mean, not the sum: values then have the size that the output projection expects.
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        mean = (total / len(outputs)).unflatten(0, (-1, self.site.heads))
        if self.norm_scale is not None:
            mean = F.rms_norm(mean, mean.shape[-1:], eps=1e-5) * self.norm_scale
        mixed = mean.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        if self.config.output_gate == "silu":
            mixed = mixed * F.silu(self._project_gate(hidden_states))
        elif self.config.output_gate == "sigmoid":
            # Twice the published one, so that a gate without weights is one.
            mixed = mixed * 2 * self._project_gate(hidden_states).sigmoid()
        return self.o_proj(mixed)

    def _project_gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        assert self.g_proj is not None
        return self.g_proj(hidden_states)

    def flops(self, tokens: int) -> int:
        """Price the projections, and each way the products within chunks, with the state and between states."""
        padded, chunk = pad_to_chunks(tokens, self.config.chunk)
        width = self.site.head_width
        inner = self.site.inner_width
        projections = 8 * tokens * self.site.width * inner + 2 * tokens * self.site.width * self.site.heads
        narrow = 2 * tokens * width * (self.site.width + inner)
        projections += narrow if self.config.decay == "channel" else 2 * tokens * self.site.width * self.site.heads
        if self.config.output_gate is not None:
            projections += 2 * tokens * self.site.width * inner if self.config.output_gate == "silu" else narrow
        projections += sum(convolution.flops(tokens) for convolution in self.convolutions.values())
        within = 6 * chunk
        if self.config.decay == "channel":
            within = 2 * chunk + 4 * count_pair_products(chunk) // chunk
        across = 8 * width
        between = 2 * width * width // chunk
        scans = len(self.directions()) * padded * inner * (within + across + between)
        return projections + scans + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """Count what torch's counter does not see: triangular systems, decays between tokens, elementwise work."""
        padded, chunk = pad_to_chunks(tokens, self.config.chunk)
        systems = padded * chunk * 2 * self.site.inner_width
        decays = 5 * padded * chunk * self.site.heads
        if self.config.decay == "channel":
            decays = 8 * padded * min(chunk, FEW) * self.site.inner_width
        return len(self.directions()) * (systems + decays + 10 * padded * self.site.inner_width)


def _narrow_linear(site: AttentionSite, *, bias: bool) -> nn.Sequential:
    """Make a map from a token's width to that of all heads, through the width of one, as published."""
    return nn.Sequential(
        nn.Linear(site.width, site.head_width, bias=False), nn.Linear(site.head_width, site.inner_width, bias=bias)
    )


def token_by_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    strength: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    backwards: bool,
) -> torch.Tensor:
    """Compute `gated_delta_rule` by its definition, one token after the other: [B, N, E]."""
    steps = list(zip(*(part.unbind(1) for part in (query, key, value, strength, log_decay.exp())), strict=True))
    state = torch.zeros_like(key[:, 0, :, None] * value[:, 0, None])
    mixed = []
    if backwards:
        steps.reverse()
    for q, k, v, share, decay in steps:
        # One for a head, or one for each channel of its keys.
        state = decay.reshape(len(decay), -1, 1) * state
        recalled = (k[:, None] @ state)[:, 0]
        state = state + k[..., None] * (share[:, None] * (v - recalled))[:, None]
        mixed.append((q[:, None] @ state)[:, 0])
    if backwards:
        mixed.reverse()
    return torch.stack(mixed, dim=1)
