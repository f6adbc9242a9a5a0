"""Two mixers on disjoint heads of one attention, such as a window on most heads and softmax on the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..core.context import Context, Grid
from ..core.shapes import HeadTensor, KeyTensor
from ..core.sites import AttentionSite, Site
from ..errors import OperatorError
from . import configure
from .base import Mixer


class Hybrid(Mixer):
    """Declares what its two mixers need together, and honours what both honour."""

    exact_with = "two that are"
    start = "projections keep their pretrained weights; each mixer starts as it does alone"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """The two mixers, and how the heads are split between them.

        Attributes:
            first, second: operators as a rule takes them: a name, a Config, or a dict.
            split: heads of the first, the others being the second's: a share of the heads (rounded, at least one
                each), a count from head 0, or the heads themselves as a tuple.
        """

        first: Any = "sliding_window"
        second: Any = "self_attention"
        split: float | int | tuple[int, ...] = 0.75

        def __post_init__(self):
            super().__post_init__()
            for name in ("first", "second"):
                config = configure(getattr(self, name))
                if not issubclass(config.owner, Mixer):
                    raise OperatorError(
                        f"hybrid: {name} is a mixer, one that replaces a softmax; {config.owner.name} is not."
                    )
                # Frozen, but not finished: two spellings of one operator are one config.
                object.__setattr__(self, name, config)
            if not _is_split(self.split):
                raise OperatorError(
                    "hybrid: split is a share of the heads, a count of them, or a tuple of them; "
                    f"got {self.split!r}. Try 0.75."
                )

        def resolved(self, site: Site) -> Hybrid.Config:
            return replace(self, first=self.first.resolved(site), second=self.second.resolved(site))

        def heads(self, site: AttentionSite) -> tuple[int, ...]:
            """Return the heads of the first mixer. Raises `OperatorError` where the split leaves a mixer none."""
            if site.heads < 2:
                raise OperatorError(
                    f"hybrid: {site.path} has one head, and two mixers need two. Choose one of them there."
                )
            chosen = self.split
            if isinstance(chosen, float):
                # A share never leaves a mixer without heads; a count that does is an error.
                chosen = min(max(1, round(chosen * site.heads)), site.heads - 1)
            if isinstance(chosen, int):
                chosen = tuple(range(min(chosen, site.heads)))
            if not 0 < len(chosen) < site.heads or max(chosen) >= site.heads:
                raise OperatorError(
                    f"hybrid: split {self.split!r} does not share the {site.heads} heads of {site.path} between two "
                    f"mixers. Give a count from 1 to {site.heads - 1}, or a tuple of heads up to {site.heads - 1}."
                )
            return chosen

    def __init__(self, config: Config, site: AttentionSite):
        super().__init__(config, site)
        first = config.heads(site)
        second = tuple(head for head in range(site.heads) if head not in first)
        self.groups = (first, second)
        self.first = config.first.build(replace(site, heads=len(first)))
        self.second = config.second.build(replace(site, heads=len(second)))
        # It needs what either needs, and honours what both honour.
        for name in ("needs_grid", "needs_hidden_states", "before_rotary", "chooses_tokens"):
            setattr(self, name, any(getattr(part, name) for part in self.parts))
        for name in ("honours_mask", "honours_others", "honours_causal", "causal_operator"):
            setattr(self, name, all(getattr(part, name) for part in self.parts))
        self.unused_inputs = tuple(name for name in self.first.unused_inputs if name in self.second.unused_inputs)

    @property
    def parts(self) -> tuple[Mixer, Mixer]:
        """The two mixers, in the order of `groups`, their heads."""
        return self.first, self.second

    @property
    def stays_causal(self) -> bool:
        return all(part.stays_causal for part in self.parts)

    def init_from(self, original: nn.Module) -> None:
        for part in self.parts:
            part.init_from(original)

    def forward(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        return self._join(lambda part: part, query, key, value, context)

    def reference(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute each mixer by its definition."""
        return self._join(lambda part: getattr(part, "reference", part), query, key, value, context)

    def countable(self, query: HeadTensor, key: KeyTensor, value: KeyTensor, context: Context) -> HeadTensor:
        """Compute each mixer in the way that torch's counter sees best."""
        return self._join(lambda part: getattr(part, "countable", part), query, key, value, context)

    def mix_parts(
        self,
        mix: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: Context,
    ) -> torch.Tensor:
        def call_of(part: Mixer) -> Callable[..., torch.Tensor]:
            return lambda *inputs: part.mix_parts(mix, *inputs)

        return self._join(call_of, query, key, value, context)

    def _join(
        self,
        call_of: Callable[[Mixer], Callable[..., torch.Tensor]],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: Context,
    ) -> torch.Tensor:
        """Run `call_of(part)` for each mixer on its heads, and put the heads back in order."""
        outputs = []
        for part, heads in zip(self.parts, self.groups, strict=True):
            inputs = [_select_heads(tensor, heads) for tensor in (query, key, value)]
            outputs.append(call_of(part)(*inputs, _context_of(context, heads)))
        # Heads come out group by group.
        order = self.groups[0] + self.groups[1]
        places = tuple(order.index(head) for head in range(len(order)))
        return _select_heads(torch.cat(outputs, dim=1), places)

    def receptive_field(self, token: int, grid: Grid) -> set[int]:
        return {seen for part in self.parts for seen in part.receptive_field(token, grid)}

    def flops(self, tokens: int) -> int:
        return sum(part.flops(tokens) for part in self.parts)

    def uncounted_flops(self, tokens: int) -> int:
        return sum(part.uncounted_flops(tokens) for part in self.parts)


def _is_split(split: Any) -> bool:
    """Return whether a setting can be a split at some number of heads."""
    if isinstance(split, tuple):
        return bool(split) and len(set(split)) == len(split) and all(type(head) is int and head >= 0 for head in split)
    if type(split) is float:
        return 0 < split < 1
    return type(split) is int and split > 0


def _select_heads(tensor: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """Select heads of [B, H, ...]."""
    # Neighbours in order are a view; the others are copied.
    first = heads[0]
    if heads == tuple(range(first, first + len(heads))):
        return tensor[:, first : first + len(heads)]
    return torch.stack([tensor[:, head] for head in heads], dim=1)


def _context_of(context: Context, heads: tuple[int, ...]) -> Context:
    """Return the context for some heads, since a mask may differ from head to head."""
    if context.unrotated is not None:
        query, key = context.unrotated
        context = context.changed(unrotated=(_select_heads(query, heads), _select_heads(key, heads)))
    mask = context.mask
    if mask is None or mask.dim() < 3 or mask.shape[-3] == 1:
        return context
    mask = mask[(None,) * (4 - mask.dim())]
    return context.changed(mask=_select_heads(mask, heads))
