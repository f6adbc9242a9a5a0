"""Gated DeltaNet: a state in which each key writes over what it recalls, and which decays as the token says; linear in
tokens.

Paper: Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..core.context import Context
from ..core.shapes import TokenTensor
from ..core.sites import AttentionSite
from .base import AttentionOperator, Projections
from .ops.backends import Backend, WithBackends, compute_dtype
from .ops.scans import decay_start, gated_delta_rule, pad_to_chunks
from .ops.settings import require_count, require_flag


def _fla(operator: GatedDeltanet, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    # Heads are rows of the batch: [B, N, H, E] with one head. The kernel multiplies in half precision, and adds up
    # strengths and decays in float32.
    held = compute_dtype(hidden_states)
    *parts, strength, log_decay = (part[:, :, None] for part in operator.project(hidden_states))
    parts = [part.to(held) for part in parts]
    outputs = []
    for backwards in operator.directions():
        turned = [part.flip(1) if backwards else part for part in (*parts, strength, log_decay)]
        query, key, value, beta, decay = turned
        mixed, _ = chunk_gated_delta_rule(query, key, value, g=decay, beta=beta, scale=1.0)
        mixed = mixed[:, :, 0]
        outputs.append(mixed.flip(1) if backwards else mixed)
    return operator.project_out(outputs, hidden_states)


class GatedDeltanet(WithBackends, AttentionOperator):
    """Queries and keys are of unit length, so that a query which is a key gives the value last written there.

    That keeps outputs at the scale of values, which is what the pretrained output projection expects; the paper's
    short convolutions, output norm and gate would change it, and are left out. Both directions have the same
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
            backend: `torch`, `auto` or `fla`.
        """

        bidirectional: bool = True
        chunk: int = 64

        def __post_init__(self):
            super().__post_init__()
            require_flag("gated_deltanet", "bidirectional", self.bidirectional)
            require_count("gated_deltanet", "chunk", self.chunk, most=1024, example=64)

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        # Names are those of flash-linear-attention's layer.
        self.q_proj = nn.Linear(site.width, site.inner_width)
        self.k_proj = nn.Linear(site.width, site.inner_width)
        self.v_proj = nn.Linear(site.width, site.inner_width)
        self.a_proj = nn.Linear(site.width, site.heads, bias=False)
        self.b_proj = nn.Linear(site.width, site.heads, bias=False)
        step_bias, log_rate = decay_start(site.heads)
        self.dt_bias = nn.Parameter(step_bias)
        self.A_log = nn.Parameter(log_rate)
        self.o_proj = nn.Linear(site.inner_width, site.width)
        self.causal_operator = not config.bidirectional

    @torch.no_grad()
    def init_from(self, original: Projections) -> None:
        for name in ("query", "key", "value", "out"):
            layer = getattr(self, f"{name[0]}_proj")
            bias = getattr(original, f"{name}_bias")
            layer.weight.copy_(getattr(original, name))
            layer.bias.zero_()
            if bias is not None:
                layer.bias.copy_(bias)

    def in_torch(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        parts = self.project(hidden_states)
        outputs = [
            gated_delta_rule(*parts, chunk=self.config.chunk, backwards=backwards) for backwards in self.directions()
        ]
        return self.project_out(outputs, hidden_states)

    def reference(self, hidden_states: TokenTensor, context: Context) -> TokenTensor:
        """Compute by definition: token by token."""
        parts = self.project(hidden_states)
        outputs = [token_by_token(*parts, backwards=backwards) for backwards in self.directions()]
        return self.project_out(outputs, hidden_states)

    def directions(self) -> tuple[bool, ...]:
        """List for each scan whether it goes backwards."""
        if self.config.bidirectional:
            return (False, True)
        return (False,)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute queries, keys and values [B * H, N, E], strength of writing and log of the decay [B * H, N]."""
        # A state in half precision forgets what is small beside it.
        precise = torch.promote_types(hidden_states.dtype, torch.float32)
        query, key, value, strength, step = (
            projection(hidden_states).to(precise).unflatten(-1, (self.site.heads, -1)).transpose(1, 2).flatten(0, 1)
            for projection in (self.q_proj, self.k_proj, self.v_proj, self.b_proj, self.a_proj)
        )
        bias, log_rate = (part.to(precise).repeat(len(hidden_states))[:, None] for part in (self.dt_bias, self.A_log))
        log_decay = -log_rate.exp() * F.softplus(step[..., 0] + bias)
        return F.normalize(query, dim=-1), F.normalize(key, dim=-1), value, strength[..., 0].sigmoid(), log_decay

    def project_out(self, outputs: list[torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        """Put the mean of the directions, [B * H, N, E] each, through the output projection: [B, N, D]."""
        # The mean, not the sum: values then have the size that the output projection expects.
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        mean = (total / len(outputs)).unflatten(0, (-1, self.site.heads)).transpose(1, 2).flatten(2)
        return self.o_proj(mean.to(hidden_states.dtype))

    def flops(self, tokens: int) -> int:
        """Price the projections, and each way the products within chunks, with the state and between states."""
        padded, chunk = pad_to_chunks(tokens, self.config.chunk)
        width = self.site.head_width
        inner = self.site.inner_width
        projections = 8 * tokens * self.site.width * inner + 4 * tokens * self.site.width * self.site.heads
        within = 6 * chunk
        across = 8 * width
        between = 2 * width * width // chunk
        scans = len(self.directions()) * padded * inner * (within + across + between)
        return projections + scans + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """Count what torch's counter does not see: triangular systems, decays between tokens, elementwise work."""
        padded, chunk = pad_to_chunks(tokens, self.config.chunk)
        systems = padded * chunk * 2 * self.site.inner_width
        decays = 5 * padded * chunk * self.site.heads
        return len(self.directions()) * (systems + decays + 10 * padded * self.site.inner_width)


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
        state = decay[:, None, None] * state
        recalled = (k[:, None] @ state)[:, 0]
        state = state + k[..., None] * (share[:, None] * (v - recalled))[:, None]
        mixed.append((q[:, None] @ state)[:, 0])
    if backwards:
        mixed.reverse()
    return torch.stack(mixed, dim=1)
