"""Two mixers on disjoint heads of one attention, such as a window on most heads and softmax on the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..core.sites import Context, Grid, Site
from ..errors import OperatorError
from . import configure
from .base import Mixer


class Hybrid(Mixer):
    """Declares what its two mixers need together, and honours what both honour."""

    start = "projections keep their pretrained weights; each mixer starts as it does alone"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Which heads go where.

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
                object.__setattr__(self, name, config)
            if not _is_split(self.split):
                raise OperatorError(
                    f"hybrid: split is a share of the heads, a count of them, or a tuple of them; got {self.split!r}. Try 0.75."
                )

        def resolved(self, site: Site) -> Hybrid.Config:
            return replace(self, first=self.first.resolved(site), second=self.second.resolved(site))

        def heads(self, site: Site) -> tuple[int, ...]:
            """The heads of the first mixer. Raises `OperatorError` where the split leaves a mixer without heads."""
            if site.heads < 2:
                raise OperatorError(
                    f"hybrid: {site.path} has one head, and two mixers need two. Choose one of them there."
                )
            share = isinstance(self.split, float)
            count = min(max(1, round(self.split * site.heads)), site.heads - 1) if share else self.split
            chosen = count if isinstance(count, tuple) else tuple(range(min(count, site.heads)))
            if not 0 < len(chosen) < site.heads or max(chosen) >= site.heads:
                raise OperatorError(
                    f"hybrid: split {self.split!r} does not share the {site.heads} heads of {site.path} between two mixers. "
                    f"Give a count from 1 to {site.heads - 1}, or a tuple of heads up to {site.heads - 1}."
                )
            return chosen

    def __init__(self, config: Config, site: Site):
        super().__init__(config, site)
        heads = config.heads(site)
        others = tuple(head for head in range(site.heads) if head not in heads)
        self.groups = (heads, others)
        self.first, self.second = (
            part.build(replace(site, heads=len(group)))
            for part, group in zip((config.first, config.second), self.groups, strict=True)
        )
        self.needs_grid = any(part.needs_grid for part in self.parts)
        for name in ("honours_mask", "honours_others", "honours_causal", "causal_operator"):
            setattr(self, name, all(getattr(part, name) for part in self.parts))
        self.unused_inputs = tuple(name for name in self.first.unused_inputs if name in self.second.unused_inputs)

    @property
    def parts(self) -> tuple[Mixer, Mixer]:
        return self.first, self.second

    @property
    def stays_causal(self) -> bool:
        return all(part.stays_causal for part in self.parts)

    def init_from(self, original: nn.Module) -> None:
        for part in self.parts:
            part.init_from(original)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        return self._mixed(self.parts, query, key, value, context)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """Each mixer by its definition."""
        return self._mixed([getattr(part, "reference", part) for part in self.parts], query, key, value, context)

    def countable(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> torch.Tensor:
        """Each mixer as torch's counter sees it best."""
        return self._mixed([getattr(part, "countable", part) for part in self.parts], query, key, value, context)

    def _mixed(
        self, mixers, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context
    ) -> torch.Tensor:
        outputs = [
            mixer(*(_of_heads(part, group) for part in (query, key, value)), _context_of(context, group))
            for mixer, group in zip(mixers, self.groups, strict=True)
        ]
        order = self.groups[0] + self.groups[1]
        return _of_heads(torch.cat(outputs, dim=1), tuple(map(order.index, range(len(order)))))

    def receptive_field(self, token: int, grid: Grid) -> set[int]:
        return {seen for part in self.parts for seen in part.receptive_field(token, grid)}

    def flops(self, tokens: int) -> int:
        return sum(part.flops(tokens) for part in self.parts)

    def uncounted_flops(self, tokens: int) -> int:
        return sum(part.uncounted_flops(tokens) for part in self.parts)


def _is_split(split: Any) -> bool:
    if isinstance(split, tuple):
        return bool(split) and len(set(split)) == len(split) and all(type(head) is int and head >= 0 for head in split)
    return (type(split) is int and split > 0) or (type(split) is float and 0 < split < 1)


def _of_heads(tensor: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """Those heads of [B, H, ...], without a copy where they are neighbours in order."""
    if heads == tuple(range(heads[0], heads[0] + len(heads))):
        return tensor[:, heads[0] : heads[0] + len(heads)]
    return torch.stack([tensor[:, head] for head in heads], dim=1)


def _context_of(context: Context, heads: tuple[int, ...]) -> Context:
    """A mask may differ from head to head."""
    if context.mask is None or context.mask.dim() < 3 or context.mask.shape[-3] == 1:
        return context
    return replace(context, mask=_of_heads(context.mask[(None,) * (4 - context.mask.dim())], heads))
