"""Seats of operators that do not run inside the part they replace: the call is the part's, the work is theirs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import nn

from ..core.sites import AttentionSite, FeedForwardSite
from ..errors import OperatorError
from ..inspection import bind_arguments
from ..operators import AttentionOperator, Operator
from .attention_core import refuse_hiding, require_tokens

# Names that attentions of diffusers give their masks.
_MASKS = ("attention_mask", "attn_mask", "mask")


class FeedForwardSeat(nn.Module):
    """A feed-forward operator behind the call of the feed-forward it replaces."""

    def __init__(self, site: FeedForwardSite, operator: Operator):
        # Not what comes next to it: a feed-forward of diffusers would build its layers.
        nn.Module.__init__(self)
        self.graft_site = site
        self.graft = operator

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        require_tokens(self.graft.name, hidden_states.shape[:-1].numel())
        # Tokens [B, N, D], without a batch [N, D], on their grid [B, F, H, W, D],
        # or as convolutions take them [B, D, H, W].
        dims = hidden_states.dim()
        if dims == 3:
            return self.graft(hidden_states, self.graft.slot.current)
        if dims == 2:
            return self.forward(hidden_states[None])[0]
        if dims == 4 and hidden_states.shape[-1] != self.graft_site.width:
            return self.forward(hidden_states.movedim(1, -1)).movedim(-1, 1)
        return self.forward(hidden_states.flatten(1, -2)).view(hidden_states.shape)


class SkippableFeedForwardSeat(FeedForwardSeat, FeedForward):
    """A seat that hooks of diffusers which skip layers find as they find the original, by its class."""


class AttentionSeat(nn.Module):
    """An operator with projections of its own, behind the call of the self-attention it replaces.

    Rotary embeddings, and whatever else the original was given besides its tokens, are dropped.

    Attributes:
        names: arguments of the original's forward, in order.
        processor: the original's, which nothing calls; some models read its attributes.
    """

    def __init__(
        self, site: AttentionSite, operator: AttentionOperator, names: tuple[str, ...], processor: Any = None
    ):
        super().__init__()
        self.graft_site = site
        self.graft = operator
        self.names = names
        self.processor = processor

    def forward(self, *args, **kwargs) -> torch.Tensor:
        arguments = bind_arguments(self.names, args, kwargs)
        hidden_states = arguments[self.names[0]]
        tokens = hidden_states.shape[1]
        require_tokens(self.graft.name, tokens)
        self._refuse_another_sequence(arguments.get("encoder_hidden_states"), hidden_states)
        self._refuse_pairs(arguments, tokens)
        # Processors drop masks that hide nothing; one that hides would be dropped here with the processor.
        for name in _MASKS:
            mask = arguments.get(name)
            if isinstance(mask, torch.Tensor):
                refuse_hiding(mask, self.graft.name)
        context = self.graft.slot.current.at(self.graft_site, tokens)
        # Whole attentions know one sequence, and text in it would have no place on the grid.
        holds_others = context.text_first is not None and context.grid is not None and tokens > context.grid.tokens
        if holds_others:
            raise OperatorError(
                f"{self.graft_site.path} mixes the image with text, or with registers, which {self.graft.name} would "
                "take for more of the image. Choose a mixer there, such as hyena_x."
            )
        return self.graft(hidden_states, context)

    def _refuse_another_sequence(self, other: torch.Tensor | None, hidden_states: torch.Tensor) -> None:
        if other is not None and other is not hidden_states:
            raise OperatorError(
                f"{self.graft.name} mixes a sequence with itself; {self.graft_site.path} was given another."
            )

    def _refuse_pairs(self, arguments: dict[str, Any], tokens: int) -> None:
        """Refuse a bias of pairs of tokens, [B, N, N, C]: no embedding that a sequence could do without."""
        for name, value in arguments.items():
            is_pairs = isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[1:3] == (tokens, tokens)
            if is_pairs and tokens > 1:
                raise OperatorError(
                    f"{self.graft_site.path} takes a bias of pairs of tokens ({name}), which {self.graft.name} would "
                    "drop. Choose a mixer that honours a bias, such as sliding_window."
                )
