"""Contexts: what a part knows of the forward that it runs in, above all how its tokens lie.

A processor is given tokens and nothing else. A hook on the model fills a `Context` for every forward, and each part
reads it through its `ContextSlot`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import GeometryError
from .sites import Site


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Layout of tokens: frames x height x width, raster order, last axis fastest.

    Raises `GeometryError` for a side that holds no token.
    """

    frames: int = 1
    height: int
    width: int

    def __post_init__(self):
        if self.frames < 1 or self.height < 1 or self.width < 1:
            raise GeometryError(
                f"A grid has 1 or more tokens on every side; got {self.frames} x {self.height} x {self.width}."
            )

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.frames * self.height * self.width

    def place_of(self, token: int) -> tuple[int, ...]:
        """Return row and column of a token, behind its frame where there are several."""
        frame, rest = divmod(token, self.height * self.width)
        place = divmod(rest, self.width)
        if self.frames == 1:
            return place
        return (frame, *place)

    def __str__(self) -> str:
        sides = [self.height, self.width]
        if self.frames > 1:
            sides.insert(0, self.frames)
        return " x ".join(map(str, sides))


@dataclass(frozen=True, kw_only=True)
class Context:
    """Knowledge of a part about the forward that it runs in.

    Attributes:
        grid: layout of the image or video tokens, or None where it is unknown.
        text_tokens: tokens of the prompt.
        references: tokens of reference images behind the image, in one sequence with it, as Flux Kontext has them.
        text_first: whether the prompt, registers or earlier frames come before the image in a sequence that holds
            both; None where that is unknown.
        aside: paths of parts that run on other sequences alone, such as a prompt's refiner.
        pyramid: whether parts also run on halved grids, as in a UNet.
        timestep: the model's own timestep argument.
        mask: attention mask as `scaled_dot_product_attention` takes it, broadcastable to [B, H, N, M].
        scale: factor on query-key products; None means 1 / sqrt(E).
        causal: whether the replaced attention was causal.
        softmax: softmax attention by the backend that `set_attention_backend` chose, called as torch's
            `scaled_dot_product_attention`; None means torch's own.
        hidden_states: [B, N, D], input of the attention, for operators that declare `needs_hidden_states`.
        unrotated: queries and keys before rotary embeddings, for operators that declare `before_rotary`.
    """

    grid: Grid | None = None
    text_tokens: int = 0
    references: int = 0
    text_first: bool | None = None
    aside: tuple[str, ...] = ()
    pyramid: bool = False
    timestep: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    scale: float | None = None
    causal: bool = False
    softmax: Callable[..., torch.Tensor] | None = None
    hidden_states: torch.Tensor | None = None
    unrotated: tuple[torch.Tensor, torch.Tensor] | None = None

    def changed(self, **changes: Any) -> Context:
        """Return a context with other values of these fields."""
        # Not `dataclasses.replace`, which older torch cannot compile.
        values = {name: getattr(self, name) for name in _FIELDS}
        return Context(**{**values, **changes})

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """Compute softmax attention by the model's backend: [B, H, N, E] and twice [B, H, M, E], as queries out."""
        call = self.softmax or F.scaled_dot_product_attention
        return call(query, key, value, attn_mask=mask, scale=scale, is_causal=causal)

    def at(self, site: Site, tokens: int) -> Context:
        """Return this context for a part that gets `tokens` tokens.

        These may be a frame of a video or a level of a pyramid, with a grid of that, or another sequence without one.
        """
        grid = self.grid
        if grid is None or grid.tokens == tokens:
            return self
        # A prompt's refiner may happen to have as many tokens as a frame, and still has no grid.
        if self.aside and site.path.startswith(self.aside):
            return self.changed(grid=None, text_first=None, references=0)
        if not self.pyramid and grid.frames == 1:
            return self
        level = Grid(height=grid.height, width=grid.width)
        while self.pyramid and level.tokens > tokens:
            # Convolutions of stride 2 round up.
            level = Grid(height=(level.height + 1) // 2, width=(level.width + 1) // 2)
        if level.tokens != tokens:
            return self
        return self.changed(grid=level)

    def require_grid(self, who: str, tokens: int) -> Grid:
        """Return the grid of a forward.

        Args:
            who: the operator that asks, to be named in errors.
            tokens: that it was given.

        Raises `GeometryError` where there is no grid, or one that does not hold `tokens` tokens.
        """
        if self.grid is None:
            raise GeometryError(
                f"{who} needs to know how tokens lie on the image, and this forward gave no grid. "
                "Call the model itself (not one of its blocks), or choose a sequence operator such as "
                "sliding_window. For a family that is not read yet, add a row to "
                "diffusers_graft/inspection/families.py that says how its tokens lie."
            )
        if self.grid.tokens != tokens:
            raise GeometryError(
                f"{who} was given {tokens} tokens, but the grid is {self.grid} = {self.grid.tokens}. "
                "Call the model itself, so that the grid of this very forward is read; parts that run on other "
                "tokens (a prompt's refiner, the frames of one place) take sequence operators, such as "
                "sliding_window."
            )
        return self.grid


_FIELDS = tuple(field.name for field in fields(Context))


@dataclass
class ContextSlot:
    """Holder of the context of the running forward, which a hook on the model fills for the parts of one graft.

    It is not cleared afterwards: parts may run again during the backward pass (see `checkpointing`). Threads that run
    one model at once have a context each; compiled code, and threads that ran no forward, read the last of all.

    Attributes:
        arguments: of the last forward of the grafted model, by name. A saved graft is proved by them where a family
            has no example inputs.
    """

    arguments: dict[str, Any] | None = None
    _last: Context = field(default_factory=Context)
    _by_thread: dict[int, Context] = field(default_factory=dict)

    @property
    def current(self) -> Context:
        """Context of the forward that runs in this thread, or that ran last."""
        if torch.compiler.is_compiling():
            return self._last
        return self._by_thread.get(threading.get_ident(), self._last)

    @current.setter
    def current(self, context: Context) -> None:
        self._last = context
        if torch.compiler.is_compiling():
            # Compiled code does not know its thread, whose older context must not come back later.
            self._by_thread = {}
        else:
            self._by_thread[threading.get_ident()] = context

    def with_attention(
        self,
        *,
        mask: torch.Tensor | None,
        scale: float | None,
        causal: bool,
        softmax: Callable[..., torch.Tensor] | None = None,
    ) -> Context:
        """Return the current context with the arguments of the attention that runs."""
        return self.current.changed(mask=mask, scale=scale, causal=causal, softmax=softmax)
