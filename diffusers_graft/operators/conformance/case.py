"""What the conformance suite runs an operator on: a small site, grids, seeded inputs and moved parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch

from ...core.context import Context, Grid
from ...core.sites import Site
from ...errors import GraftError
from ..base import BlockOperator, Mixer, Operator, OperatorConfig

# An operator may refuse some of them, with words, for example where its window is larger than the grid.
GRIDS = (Grid(height=8, width=8), Grid(height=9, width=13), Grid(height=25, width=23))


class ConformanceError(GraftError):
    """An operator does not keep what it declares; the message begins with the name of the check."""


@dataclass(frozen=True)
class Subject:
    """An operator under test, with what it takes to run it: inputs, a context, a fresh copy whenever one is needed."""

    config: OperatorConfig
    site: Site
    grid: Grid = GRIDS[0]

    def build(self, seed: int = 0) -> Operator:
        """In float64, with every parameter moved off its start, so that gates that start closed hide nothing."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            operator = self.config.resolved(self.site).build(self.site).double().eval()
            with torch.no_grad():
                for parameter in operator.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return operator

    def inputs(self, seed: int = 1, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if not issubclass(self.config.owner, Mixer):
            outputs = self.site.blocks if issubclass(self.config.owner, BlockOperator) else 0
            shapes = [(batch, self.grid.tokens, self.site.width)] * (1 + outputs)
        else:
            shapes = [(batch, self.site.heads, self.grid.tokens, self.site.head_width)] * 3
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    @property
    def context(self) -> Context:
        return Context(grid=self.grid)

    def on(self, grid: Grid) -> Subject:
        return dataclasses.replace(self, grid=grid)

    def accepted(self) -> list[Subject]:
        """This subject on each of `GRIDS` that the operator does not refuse with words."""
        subjects, refusals = [self.on(grid) for grid in GRIDS], []
        for subject in tuple(subjects):
            try:
                run(subject.build(), subject.inputs(batch=1), subject.context)
            except GraftError as refusal:
                subjects.remove(subject)
                refusals.append(str(refusal))
        if not subjects:
            fail("every_grid", f"it refuses {', '.join(map(str, GRIDS))}; the last of them so: {refusals[-1]}")
        return subjects


def fail(check: str, seen: str) -> NoReturn:
    """Say which check failed, and on what."""
    raise ConformanceError(f"{check}: {seen}")


def run(operator: Operator, inputs: list[torch.Tensor], context: Context) -> torch.Tensor:
    """The operator's output."""
    return operator(*inputs, context)


def gradients(
    call: Callable[..., torch.Tensor], operator: Operator, inputs: list[torch.Tensor], context: Context
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The output of `call`, and gradients of a fixed weighting of it to inputs and parameters, None where unused."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output = call(*inputs, context)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(output)
    wanted = [*inputs, *operator.parameters()]
    if not output.requires_grad:
        return output, (None,) * len(wanted)
    return output.detach(), torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
