"""Subjects of the conformance suite: an operator on a small site, with grids, seeded inputs and moved parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from ...core.context import Context, Grid
from ...core.sites import AttentionSite, BlockSite, FeedForwardSite, Site
from ...errors import GraftError
from ..base import (
    AttentionOperator,
    BlockOperator,
    FeedForwardOperator,
    LinearPair,
    Mixer,
    Operator,
    OperatorConfig,
    Projections,
)

# An operator may refuse some of them, with words, for example where its window is larger than the grid.
GRIDS = (
    Grid(height=8, width=8),
    Grid(height=9, width=13),
    Grid(height=25, width=23),
    Grid(frames=3, height=5, width=7),
)


class ConformanceError(GraftError):
    """An operator breaks what it declares; the message begins with the name of the check."""


def example_site(kind: str) -> Site:
    """Make a small site of a kind, to build an operator on."""
    if kind == "feed_forward":
        return FeedForwardSite(
            kind=kind, index=0, path="blocks.0.ff", width=12, hidden=48, activation="gelu-approximate"
        )
    if kind.startswith("block"):
        return BlockSite(kind=kind, index=0, path="blocks.0", width=12, blocks=1 if kind == "block" else 2, streams=1)
    return AttentionSite(kind=kind, index=0, path="blocks.0.attn", width=12, heads=3, head_width=4)


@dataclass(frozen=True)
class Subject:
    """An operator under test, with all it takes to run it: inputs, a context, a fresh copy whenever one is needed."""

    config: OperatorConfig
    site: Site
    grid: Grid = GRIDS[0]

    def build(self, seed: int = 0) -> Operator:
        """Build in float64, with every parameter moved off its start, so that gates that start closed hide nothing."""
        # Forked, so that a check leaves the caller's random numbers alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            operator = self.config.resolved(self.site).build(self.site).double().eval()
            with torch.no_grad():
                for parameter in operator.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return operator

    def start(self, seed: int = 0) -> Operator:
        """Build in float32 and start from an example of the part that is replaced, as a graft does."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            operator = self.config.resolved(self.site).build(self.site).eval()
            # Operators of blocks start as they are made.
            if not isinstance(operator, BlockOperator):
                operator.init_from(example_original(operator))
        return operator

    def inputs(self, seed: int = 1, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """Draw the inputs of a forward, on the grid.

        Behind queries, keys and values come those that a mixer declares to read in its context (see `in_context`).
        """
        generator = torch.Generator().manual_seed(seed)
        site = self.site
        if issubclass(self.config.owner, Mixer):
            assert isinstance(site, AttentionSite)
            heads = (batch, site.heads, self.grid.tokens, site.head_width)
            needs_hidden_states, before_rotary = _declared_needs(self.config, site)
            shapes = [heads] * 3
            shapes += [(batch, self.grid.tokens, site.width)] * needs_hidden_states
            shapes += [heads] * 2 * before_rotary
        else:
            blocks = site.blocks if isinstance(site, BlockSite) else 0
            shapes = [(batch, self.grid.tokens, site.width)] * (1 + blocks)
        # Drawn in one precision and rounded, so that they are comparable between precisions.
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    @property
    def context(self) -> Context:
        """The context of a forward on the grid."""
        return Context(grid=self.grid)

    def on(self, grid: Grid) -> Subject:
        """Return this subject on another grid."""
        return dataclasses.replace(self, grid=grid)

    def accepted(self) -> list[Subject]:
        """Return this subject on each of `GRIDS` that the operator does not refuse with words."""
        return list(_accepted(self.config, self.site))

    def on_other_sites(self) -> list[Subject]:
        """Return this subject on sites of other sizes, as far as it can be built there."""
        subjects = [dataclasses.replace(self, site=site) for site in _other_sites(self.site)]
        return [subject for subject in subjects if _is_accepted(subject)]


def _other_sites(site: Site) -> list[Site]:
    """Return sites of the same kind whose sizes differ and have no factor that an operator could rely on."""
    if isinstance(site, AttentionSite):
        # The second is wider inside than outside, as some models are.
        sizes = [{"width": 20, "heads": 5, "head_width": 4}, {"width": 10, "heads": 4, "head_width": 6}]
    elif isinstance(site, FeedForwardSite):
        sizes = [{"width": 10, "hidden": 25}]
    else:
        sizes = [{"width": 10, "streams": 2}]
    return [dataclasses.replace(site, **changes) for changes in sizes]


def _is_accepted(subject: Subject) -> bool:
    try:
        run(subject.build(), subject.inputs(batch=1), subject.context)
    except GraftError:
        return False
    return True


@functools.lru_cache(maxsize=8)
def _accepted(config: OperatorConfig, site: Site) -> tuple[Subject, ...]:
    subjects = []
    refusal = None
    for grid in GRIDS:
        subject = Subject(config, site, grid)
        try:
            run(subject.build(), subject.inputs(batch=1), subject.context)
        except GraftError as error:
            refusal = error
        else:
            subjects.append(subject)
    if not subjects:
        fail("every_grid", f"it refuses {', '.join(map(str, GRIDS))}; the last of them so: {refusal}")
    return tuple(subjects)


def example_original(operator: Operator) -> Any:
    """Draw an example of the part that an operator replaces, as its `init_from` receives it."""
    site = operator.site
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    if isinstance(operator, FeedForwardOperator):
        return LinearPair(
            up=draw(site.hidden, site.width),
            up_bias=draw(site.hidden),
            down=draw(site.width, site.hidden),
            down_bias=draw(site.width),
            activation=site.activation,
        )
    weights = {name: draw(site.inner_width, site.width) for name in ("query", "key", "value")}
    out = draw(site.width, site.inner_width)
    if isinstance(operator, AttentionOperator):
        return Projections(**weights, out=out)
    # A mixer receives the attention itself.
    attention = nn.Module()
    for name, weight in weights.items():
        attention.add_module(f"to_{name[0]}", _linear(weight))
    attention.to_out = nn.ModuleList([_linear(out)])
    attention.heads = site.heads
    return attention


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    return layer


def fail(check: str, seen: str) -> NoReturn:
    """Raise the error of a check that failed."""
    raise ConformanceError(f"{check}: {seen}")


@functools.lru_cache(maxsize=64)
def _declared_needs(config: OperatorConfig, site: Site) -> tuple[bool, bool]:
    """Return whether a mixer needs hidden states, and whether it comes before rotary embeddings."""
    # Declared by the instance, since it may depend on settings; no memory for weights is needed to ask.
    with torch.device("meta"):
        operator: Any = config.resolved(site).build(site)
    return operator.needs_hidden_states, operator.before_rotary


def in_context(operator: Operator, inputs: list[torch.Tensor], context: Context) -> tuple[Any, ...]:
    """Return the arguments of a forward, with the inputs that a mixer reads in its context moved there."""
    if not isinstance(operator, Mixer):
        return (*inputs, context)
    query, key, value, *more = inputs
    if operator.needs_hidden_states:
        context = dataclasses.replace(context, hidden_states=more.pop(0))
    if operator.before_rotary:
        context = dataclasses.replace(context, unrotated=tuple(more))
    return query, key, value, context


def run(operator: Operator, inputs: list[torch.Tensor], context: Context) -> torch.Tensor:
    """Compute the operator's output."""
    return operator(*in_context(operator, inputs, context))


def gradients(
    call: Callable[..., torch.Tensor], operator: Operator, inputs: list[torch.Tensor], context: Context
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Compute the output of `call`, and gradients of a weighting of it to inputs and parameters, None if unused."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output = call(*in_context(operator, inputs, context))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(output)
    wanted = [*inputs, *operator.parameters()]
    # An output that depends on nothing has no graph to ask.
    if not output.requires_grad:
        return output, (None,) * len(wanted)
    return output.detach(), torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
