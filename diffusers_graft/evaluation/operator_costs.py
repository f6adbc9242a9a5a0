"""Costs of operators by themselves: time against the part they replace, parameters, FLOPs, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ..core.context import Context, Grid
from ..core.progress import hide_bar
from ..core.sites import AttentionSite, Site
from ..core.tables import Table
from ..errors import GeometryError, GraftError, OperatorError
from ..operators import AttentionOperator, Mixer, Operator, OperatorConfig, available, get
from ..operators.base import BlockOperator
from .benchmark import PeakMemory, compare, require_rounds

Run = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class OperatorCost:
    """Measurements of one operator at one shape.

    Attributes:
        config: its settings.
        baseline: the part it is timed against: `softmax`, `attention` (softmax with its four projections) or `mlp` (of
            r = 4).
        parameters, flops: of the operator itself, for one sample.
        flops_ratio: of its FLOPs to the baseline's: the ratio of times if both ran as densely.
        milliseconds: median.
        ratio, low, high: of its time to the baseline's, median and quartiles over rounds.
        refusal: the reason why it could not run at that shape; then the measurements are zero.
    """

    config: OperatorConfig
    baseline: str
    parameters: int = 0
    flops: int = 0
    flops_ratio: float = 0.0
    milliseconds: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    refusal: str = ""


def build_example(config: OperatorConfig, *, width: int, heads: int) -> Operator:
    """Build an operator with random weights, on a site of the first kind it replaces."""
    kind = config.owner.kinds[0]
    attention = {"heads": heads, "head_width": width // heads}
    feed_forward = {"hidden": 4 * width, "activation": "gelu-approximate"}
    sizes = feed_forward if kind == "feed_forward" else attention
    site = Site(kind=kind, index=0, path="example", width=width, **sizes)
    return config.resolved(site).build(site).eval()


def example_tensors(operator: Operator, tokens: int, *, seed: int = 0) -> list[torch.Tensor]:
    """Return random inputs of one sample: three of [1, H, N, E] for a mixer, else one of [1, N, D].

    In memory tokens come before heads, as projections leave them, so that copies into another order are timed too.
    """
    generator = torch.Generator().manual_seed(seed)
    site = operator.site
    if not isinstance(operator, Mixer):
        # attentions with projections and feed-forwards read hidden states
        return [torch.randn(1, tokens, site.width, generator=generator)]
    return [torch.randn(1, tokens, site.heads, site.head_width, generator=generator).transpose(1, 2) for _ in range(3)]


def example_context(operator: Operator, grid: Grid) -> Context:
    """Return the context of one sample, with random numbers for what a mixer declares to read in it."""
    context = Context(grid=grid)
    if not isinstance(operator, Mixer):
        return context
    if operator.needs_hidden_states:
        generator = torch.Generator().manual_seed(1)
        hidden_states = torch.randn(1, grid.tokens, operator.site.width, generator=generator)
        context = replace(context, hidden_states=hidden_states)
    if operator.before_rotary:
        query, key, _ = example_tensors(operator, grid.tokens, seed=2)
        context = replace(context, unrotated=(query, key))
    return context


def operator_costs(
    configs: Iterable[OperatorConfig],
    *,
    grid: Grid,
    width: int,
    heads: int,
    backward: bool = False,
    rounds: int = 5,
    progress: bool = True,
    clock: Callable[[], float] | None = None,
) -> list[OperatorCost]:
    """Time operators on CPU against what they replace, in turns.

    Args:
        grid: layout of the tokens.
        width, heads: of the model (D, H).
        backward: forward and backward, instead of forward alone.
        rounds: runs of each that are measured.
        progress: show a bar, where there is a terminal.
        clock: see `compare`.

    Raises `GraftError` for fewer than two rounds; the refusal of an operator is part of its row.
    """
    require_rounds(rounds)
    rows = []
    for config in tqdm(list(configs), desc="operators", unit="operator", disable=hide_bar(progress)):
        operator = build_example(config, width=width, heads=heads)
        name, baseline = _baseline(operator)
        inputs = example_tensors(operator, grid.tokens)
        call = partial(_call, operator, example_context(operator, grid))
        runs = {name: make_run(baseline, inputs, backward), "operator": make_run(call, inputs, backward)}
        try:
            timing = compare(runs, rounds=rounds, clock=clock)[1]
        except GraftError as error:
            # a table of all operators must not end at the one that needs another grid
            rows.append(OperatorCost(config, name, refusal=str(error)))
            continue
        flops = operator.flops(grid.tokens)
        cost = OperatorCost(
            config,
            name,
            parameters=sum(parameter.numel() for parameter in operator.parameters()),
            flops=flops,
            flops_ratio=flops / baseline_flops(operator, grid.tokens),
            milliseconds=1000 * timing.seconds,
            ratio=timing.ratio,
            low=timing.low,
            high=timing.high,
        )
        rows.append(cost)
    return rows


def peak_memory(config: OperatorConfig, grid: Grid, *, width: int, heads: int, backward: bool = False) -> int:
    """Measure the bytes of tensors alive at once above the inputs, in one run on one sample."""
    operator = build_example(config, width=width, heads=heads)
    inputs = example_tensors(operator, grid.tokens)
    run = make_run(partial(_call, operator, example_context(operator, grid)), inputs, backward)
    # the first run makes tables that all later ones use, so the second is measured
    run()
    with PeakMemory() as memory:
        run()
    return memory.peak


def _call(operator: Operator, context: Context, *inputs: torch.Tensor) -> torch.Tensor:
    return operator(*inputs, context)


def make_run(call: Run, inputs: list[torch.Tensor], backward: bool) -> Callable[[], None]:
    """Return the call that is timed: one forward, or one forward and backward to every input."""

    def forward() -> None:
        with torch.no_grad():
            call(*inputs)

    def forward_and_backward() -> None:
        # gradients of the inputs cost as much as those of the weights, and both are needed in training
        call(*(tensor.detach().requires_grad_() for tensor in inputs)).sum().backward()

    return forward_and_backward if backward else forward


def _baseline(operator: Operator) -> tuple[str, Run]:
    """Return the part that an operator replaces, with its name."""
    site = operator.site
    if isinstance(operator, Mixer):
        return "softmax", F.scaled_dot_product_attention
    if isinstance(operator, AttentionOperator):
        assert isinstance(site, AttentionSite)
        return "attention", _Attention(site)
    mlp = nn.Sequential(nn.Linear(site.width, site.hidden), nn.GELU("tanh"), nn.Linear(site.hidden, site.width))
    return "mlp", mlp


def baseline_flops(operator: Operator, tokens: int) -> int:
    """Count the FLOPs of the part an operator is timed against, for one sample: matrix products alone."""
    site = operator.site
    if not isinstance(operator, Mixer | AttentionOperator):
        return 4 * tokens * site.width * site.hidden
    softmax = 4 * tokens**2 * site.inner_width
    if isinstance(operator, Mixer):
        return softmax
    return softmax + 8 * tokens * site.width * site.inner_width


class _Attention(nn.Module):
    """Softmax attention with its four projections."""

    def __init__(self, site: AttentionSite):
        super().__init__()
        self.site = site
        self.projections = nn.ModuleList(nn.Linear(site.width, site.inner_width) for _ in range(3))
        self.out = nn.Linear(site.inner_width, site.width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = (projection(hidden_states) for projection in self.projections)
        heads = (tensor.unflatten(-1, (self.site.heads, -1)).transpose(1, 2) for tensor in projected)
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def list_operators(*, tokens: int, width: int, heads: int, say: Callable[[str], None]) -> None:
    """Print every operator with its default settings: the kinds it replaces, its measured cost, its start, its paper.

    Raises `GeometryError` for tokens that are no square, `OperatorError` for heads that do not divide the width.
    """
    side = math.isqrt(max(0, tokens))
    if side < 1 or side * side != tokens:
        raise GeometryError(f"Costs are measured on a square of tokens; {tokens} is none. Try {max(1, side) ** 2}.")
    if heads < 1 or width < heads or width % heads:
        raise OperatorError(f"{heads} heads do not divide a width of {width}. Try --width {64 * max(1, heads)}.")
    owners, refusals = _import_operators()
    configs = [owner.Config() for owner in owners if not issubclass(owner, BlockOperator)]
    costs = operator_costs(configs, grid=Grid(height=side, width=side), width=width, heads=heads)
    rows = [_cost_row(cost) for cost in costs]
    # not measured: a block costs as much as the parts it holds
    rows += [
        (owner.name, ", ".join(owner.kinds), "", "", "", "") for owner in owners if issubclass(owner, BlockOperator)
    ]
    heading = ("operator", "replaces", "time", "of", "parameters", "MFLOPs")
    say(Table(rows, heading=heading, numbers=(2, 4, 5), is_ruled=True).to_text())
    threads = torch.get_num_threads()
    say(f"\nForward at {tokens} tokens, width {width}, {heads} heads, fp32, {threads} threads; default settings.")
    say("Time is against the part it replaces: softmax, an attention with its projections, or an mlp of r = 4.")
    say("Operators that replace blocks cost as much as the parts they hold.\n")
    for owner in owners:
        say(f"{owner.name}: {owner.start or 'starts from random weights'}. {owner.paper}")
    for refusal in refusals:
        say(f"\nLeft out: {refusal}")


def _cost_row(cost: OperatorCost) -> tuple[str, ...]:
    owner = cost.config.owner
    time = "refused" if cost.refusal else f"{cost.ratio:.2f} x"
    flops = f"{cost.flops / 1e6:,.1f}"
    return (owner.name, ", ".join(owner.kinds), time, cost.baseline, f"{cost.parameters:,}", flops)


def _import_operators() -> tuple[list[type[Operator]], list[str]]:
    """Return the operators that can be imported, and the errors of those of other packages that cannot."""
    owners = []
    refusals = []
    for name in available():
        try:
            owners.append(get(name))
        except OperatorError as refusal:
            refusals.append(str(refusal))
    return owners, refusals
