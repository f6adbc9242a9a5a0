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
from ..core.sites import Site
from ..errors import OperatorError
from .base import AttentionOperator, Projections
from .ops.backends import Backend, WithBackends
from .ops.scans import decay_start, gated_delta_rule


def _fla(operator: GatedDeltanet, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    # Heads are rows of the batch; the kernel takes queries, keys and values in half precision, [B, N, H, E].
    *parts, strength, log_decay = (part[:, :, None] for part in operator.projected(hidden_states))
    parts, mixed = [part.to(hidden_states.dtype) for part in parts], []
    for backwards in operator.ways():
        turned = [part.flip(1) if backwards else part for part in (*parts, strength, log_decay)]
        query, key, value, beta, g = turned
        output = chunk_gated_delta_rule(query, key, value, g=g, beta=beta, scale=1.0)[0][:, :, 0]
        mixed.append(output.flip(1) if backwards else output)
    return operator.output(mixed, hidden_states)


class GatedDeltanet(WithBackends, AttentionOperator):
    """Queries and keys are of unit length, so that a query which is a key gives the value last written there.

    That keeps outputs at the scale of values, which is what the pretrained output projection expects; the paper's
    short convolutions, output norm and gate would change it, and are left out. Both directions have the same
    projections and decays, and their outputs are averaged. The state is kept in float32 whatever the inputs'
    precision.
    """

    backends = (Backend("fla", _fla, "fla.ops.gated_delta_rule"),)
    paper = "Gated Delta Networks, arXiv 2412.06464"
    start = (
        "queries, keys, values and output start from the pretrained projections, without norms and rotary embeddings; decay "
        "and strength of writing start random"
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
            if type(self.bidirectional) is not bool:
                raise OperatorError(f"gated_deltanet: bidirectional is True or False; got {self.bidirectional!r}.")
            if type(self.chunk) is not int or self.chunk < 1:
                raise OperatorError(f"gated_deltanet: chunk counts tokens from 1; got {self.chunk!r}. Try 64.")

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(site.width, site.inner_width) for _ in range(3))
        self.a_proj, self.b_proj = (nn.Linear(site.width, site.heads, bias=False) for _ in range(2))
        self.dt_bias, self.A_log = (nn.Parameter(start) for start in decay_start(site.heads))
        self.o_proj = nn.Linear(site.inner_width, site.width)
        self.causal_operator = not config.bidirectional

    @torch.no_grad()
    def init_from(self, original: Projections) -> None:
        for name in ("query", "key", "value", "out"):
            layer, bias = getattr(self, f"{name[0]}_proj"), getattr(original, f"{name}_bias")
            layer.weight.copy_(getattr(original, name))
            layer.bias.zero_() if bias is None else layer.bias.copy_(bias)

    def in_torch(self, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
        parts = self.projected(hidden_states)
        mixed = [gated_delta_rule(*parts, chunk=self.config.chunk, backwards=backwards) for backwards in self.ways()]
        return self.output(mixed, hidden_states)

    def reference(self, hidden_states: torch.Tensor, context: Context) -> torch.Tensor:
        """The definition: token by token."""
        parts = self.projected(hidden_states)
        return self.output([token_by_token(*parts, backwards=backwards) for backwards in self.ways()], hidden_states)

    def ways(self) -> tuple[bool, ...]:
        """Whether each scan goes backwards."""
        return (False, True) if self.config.bidirectional else (False,)

    def projected(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [B * H, N, E], strength of writing and log of the decay [B * H, N]."""
        precise = torch.promote_types(hidden_states.dtype, torch.float32)
        projections = self.q_proj, self.k_proj, self.v_proj, self.b_proj, self.a_proj
        query, key, value, strength, step = (
            projection(hidden_states).to(precise).unflatten(-1, (self.site.heads, -1)).transpose(1, 2).flatten(0, 1)
            for projection in projections
        )
        bias, rate = (part.to(precise).repeat(len(hidden_states))[:, None] for part in (self.dt_bias, self.A_log))
        log_decay = -rate.exp() * F.softplus(step[..., 0] + bias)
        return F.normalize(query, dim=-1), F.normalize(key, dim=-1), value, strength[..., 0].sigmoid(), log_decay

    def output(self, mixed: list[torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        """The mean of the ways, [B * H, N, E] each, through the output projection."""
        mean = sum(mixed) / len(mixed)
        mean = mean.unflatten(0, (-1, self.site.heads)).transpose(1, 2).flatten(2)
        return self.o_proj(mean.to(hidden_states.dtype))

    def flops(self, tokens: int) -> int:
        """Projections, and each way the products within chunks, with the state, and from state to state."""
        (padded, chunk), width = self._chunked(tokens), self.site.head_width
        projections = (
            8 * tokens * self.site.width * self.site.inner_width + 4 * tokens * self.site.width * self.site.heads
        )
        within, across, steps = 6 * chunk, 8 * width, 2 * width * width // chunk
        scans = len(self.ways()) * padded * self.site.inner_width * (within + across + steps)
        return projections + scans + self.uncounted_flops(tokens)

    def uncounted_flops(self, tokens: int) -> int:
        """The triangular systems, which torch's counter does not see, decays between tokens, and elementwise work."""
        padded, chunk = self._chunked(tokens)
        systems = padded * chunk * 2 * self.site.inner_width
        decays = 5 * padded * chunk * self.site.heads
        return len(self.ways()) * (systems + decays + 10 * padded * self.site.inner_width)

    def _chunked(self, tokens: int) -> tuple[int, int]:
        """Tokens of all chunks together, and of one."""
        chunk = min(self.config.chunk, tokens)
        return tokens + -tokens % chunk, chunk


def token_by_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    strength: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    backwards: bool,
) -> torch.Tensor:
    """What `gated_delta_rule` is by definition: one token after the other."""
    steps = list(zip(*(part.unbind(1) for part in (query, key, value, strength, log_decay.exp())), strict=True))
    state, mixed = torch.zeros_like(key[:, 0, :, None] * value[:, 0, None]), []
    for q, k, v, share, decay in reversed(steps) if backwards else steps:
        state = decay[:, None, None] * state
        recalled = (k[:, None] @ state)[:, 0]
        state = state + k[..., None] * (share[:, None] * (v - recalled))[:, None]
        mixed.append((q[:, None] @ state)[:, 0])
    return torch.stack(mixed[::-1] if backwards else mixed, dim=1)
