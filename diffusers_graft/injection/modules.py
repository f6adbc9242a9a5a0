"""Seats of operators that do not run inside the part they replace: the call is the part's, the work is theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core.sites import Site
from ..errors import OperatorError
from ..inspection import bind_arguments
from ..operators import AttentionOperator, Operator
from .attention_core import refuse_hiding, require_tokens


class FeedForwardSeat(nn.Module):
    """A feed-forward operator behind the call of the feed-forward it replaces."""

    def __init__(self, site: Site, operator: Operator):
        super().__init__()
        self.graft_site, self.graft = site, operator

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        require_tokens(self.graft.name, hidden_states.shape[:-1].numel())
        if hidden_states.dim() == 3:
            return self.graft(hidden_states, self.graft.slot.current)
        # Tokens without a batch [N, D], on their grid [B, F, H, W, D], or as a convolution takes them [B, D, H, W].
        channels_first = hidden_states.dim() == 4 and hidden_states.shape[-1] != self.graft_site.width
        tokens = hidden_states.movedim(1, -1) if channels_first else hidden_states
        batch = 1 if tokens.dim() == 2 else tokens.shape[0]
        mixed = self.graft(tokens.reshape(batch, -1, tokens.shape[-1]), self.graft.slot.current).view(tokens.shape)
        return mixed.movedim(-1, 1) if channels_first else mixed


class AttentionSeat(nn.Module):
    """An operator with projections of its own, behind the call of the self-attention it replaces.

    Rotary embeddings and whatever else the original was given besides its tokens go with it.

    Attributes:
        processor: the original's, which nothing calls; some models look at it.
    """

    def __init__(self, site: Site, operator: AttentionOperator, names: tuple[str, ...], processor: Any = None):
        super().__init__()
        self.graft_site, self.graft, self.names, self.processor = site, operator, names, processor

    def forward(self, *args, **kwargs) -> torch.Tensor:
        given = bind_arguments(self.names, args, kwargs)
        hidden_states, other = given[self.names[0]], given.get("encoder_hidden_states")
        require_tokens(self.graft.name, hidden_states.shape[1])
        if other is not None and other is not hidden_states:
            raise OperatorError(
                f"{self.graft.name} mixes a sequence with itself; {self.graft_site.path} was given another."
            )
        self._refuse_pairs(given, hidden_states.shape[1])
        for mask in (given.get(name) for name in ("attention_mask", "attn_mask", "mask")):
            if isinstance(mask, torch.Tensor):
                refuse_hiding(mask, self.graft.name)
        context = self.graft.slot.current.at(self.graft_site, hidden_states.shape[1])
        if (
            context.text_first is not None
            and context.grid is not None
            and hidden_states.shape[1] > context.grid.tokens
        ):
            raise OperatorError(
                f"{self.graft_site.path} mixes the image with text, or with registers, which {self.graft.name} would take for "
                "more of the image. Choose a mixer there, such as hyena_x."
            )
        return self.graft(hidden_states, context)

    def _refuse_pairs(self, given: dict[str, Any], tokens: int) -> None:
        """What a model knows of pairs of tokens, [B, N, N, C], is no embedding that a sequence could do without."""
        for name, value in given.items():
            if (
                tokens > 1
                and isinstance(value, torch.Tensor)
                and value.dim() == 4
                and value.shape[1:3] == (tokens, tokens)
            ):
                raise OperatorError(
                    f"{self.graft_site.path} is told of pairs of tokens ({name}), which {self.graft.name} would not hear of. "
                    "Choose a mixer that honours a bias, such as sliding_window."
                )
