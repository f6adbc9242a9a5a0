"""The cost of a model: parameters, depth, and floating-point operations of one forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from ..core.sites import BlockSite
from ..injection.graft import get_graft, is_enabled
from ..inspection import evaluating, example_inputs, find_sites, predict
from ..operators import BlockOperator, Mixer, Operator


def _softmax_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Count two matrix products, from the shapes [B, H, N, E] of the queries and [B, H, M, E] of the keys."""
    batch, heads, tokens, width = query
    return 4 * batch * heads * tokens * key[2] * width


# torch's counter knows the softmax kernels of CUDA but not the one of CPUs.
FLOP_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _softmax_flops}


def count_parameters(model: ModelMixin) -> int:
    """Count the parameters that run: those of original parts do not count while a graft replaces them."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_depth(model: ModelMixin) -> int:
    """Count the blocks that run one after the other: those side by side are one, removed ones are none."""
    # found without the graft's blocks: sites are those of the original
    depth = len(find_sites(model, blocks=True).where(kind="block"))
    if not is_enabled(model):
        return depth
    graft = get_graft(model)
    assert graft is not None
    for edit in graft.plan.edits:
        if isinstance(edit.site, BlockSite):
            operator_class = edit.config.owner
            assert issubclass(operator_class, BlockOperator)
            depth -= edit.site.blocks - operator_class.runs_blocks
    return depth


@torch.no_grad()
def count_flops(model: ModelMixin, inputs: dict[str, Any] | None = None) -> int:
    """Count the floating-point operations of one forward, a multiply-add as two.

    torch's counter sees matrix products, convolutions and softmax attention; it is blind to the rest, and it counts
    padding and tiles. Operators are therefore priced by their `flops(tokens)`, and the counter prices everything
    around them.

    Args:
        inputs: arguments of the model; one example of its native size unless given.
    """
    inputs = inputs or example_inputs(model)
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    # totals alone are read here
    counter.mod_tracker = _NoModules()  # pyright: ignore[reportAttributeAccessIssue]  # what of a ModuleTracker it reads
    prices: list[_Price] = []
    graft = get_graft(model)
    if graft is not None and is_enabled(model):
        for operator in graft.operators().values():
            prices += [_Price(part, counter) for part in _priced_parts(operator)]
    with evaluating(model), counter, contextlib.ExitStack() as hooks:
        for price in prices:
            hooks.enter_context(price.hooks())
        predict(model, inputs)
    return counter.get_total_flops() + sum(price.difference for price in prices)


def _priced_parts(operator: Operator) -> list[Operator]:
    """Return the operators with a price: those inside a hybrid, which beside text run one by one, or itself."""
    # operators of blocks have no price: the counter is right about them, stream by stream
    if isinstance(operator, BlockOperator):
        return []
    inner: list[Operator] = []
    for child in operator.children():
        if isinstance(child, Operator):
            inner += _priced_parts(child)
    return inner or [operator]


class _NoModules(contextlib.nullcontext):
    """Replacement of torch's tracker of modules, which fails on views of parameters in no_grad."""

    parents = ("Global",)


class _Price:
    """The cost of an operator by its `flops`, over all its calls, less the counter's figure for them.

    Attributes:
        difference: of the two, which corrects the counter's total.
    """

    def __init__(self, operator: Operator, counter: FlopCounterMode):
        self.operator = operator
        self.counter = counter
        self.difference = 0
        self._total_before = 0

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the operator's calls inside the block."""
        handles = [
            self.operator.register_forward_pre_hook(self._begin),
            self.operator.register_forward_hook(self._end),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, operator: Operator, args: tuple) -> None:
        self._total_before = self.counter.get_total_flops()

    def _end(self, operator: Operator, args: tuple, output: torch.Tensor) -> None:
        # `flops` is of one sample
        batch = len(args[0])
        tokens = args[0].shape[-2]
        # keys beyond the queries are those of text tokens, which stay under softmax
        softmax = 0
        others = args[1].shape[-2] - tokens if isinstance(operator, Mixer) else 0
        if others:
            if not operator.honours_others:
                # `flops` says nothing of keys of another sequence: the counter's figure stays
                return
            softmax = 4 * tokens * others * operator.site.inner_width
        counted = self.counter.get_total_flops() - self._total_before
        self.difference += batch * (operator.flops(tokens) + softmax) - counted
