"""What a model costs: parameters, and floating-point operations of one forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from ..core.sites import BLOCK_KINDS
from ..injection.graft import get_graft, is_enabled
from ..inspection import evaluating, example_inputs, find_sites, predict
from ..operators import BlockOperator, Mixer, Operator


def _softmax_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Two matrix products, from the shapes [B, H, N, E] of the queries and [B, H, M, E] of the keys."""
    batch, heads, tokens, width = query
    return 4 * batch * heads * tokens * key[2] * width


# torch's counter knows the softmax kernels of CUDA but not the one of CPUs.
FLOP_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _softmax_flops}


def count_parameters(model: ModelMixin) -> int:
    """Parameters that run: those of the original parts are not counted while a graft stands in for them."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_depth(model: ModelMixin) -> int:
    """Blocks that run one after the other: those side by side are one, and what stands in for removed ones is none."""
    depth = len(find_sites(model, blocks=True).where(kind="block"))
    for edit in get_graft(model).plan.edits if is_enabled(model) else ():
        if edit.site.kind in BLOCK_KINDS:
            depth -= edit.site.blocks - edit.config.owner.runs_blocks
    return depth


@torch.no_grad()
def count_flops(model: ModelMixin, inputs: dict[str, Any] | None = None) -> int:
    """Floating-point operations of one forward, a multiply-add counting two.

    torch's counter sees matrix products, convolutions and softmax attention; it is blind to the rest, and it counts
    padding and tiles. Operators are therefore priced by their own `flops(tokens)`, and the counter prices everything
    around them.

    Args:
        inputs: arguments of the model; one example of its own size unless given.
    """
    inputs = inputs or example_inputs(model)
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    counter.mod_tracker = _NoModules()
    operators = get_graft(model).operators().values() if is_enabled(model) else ()
    prices = [_Price(part, counter) for operator in operators for part in _computing_parts(operator)]
    with evaluating(model), counter, contextlib.ExitStack() as hooks:
        for price in prices:
            hooks.enter_context(price.hooks())
        predict(model, inputs)
    return counter.get_total_flops() + sum(price.difference for price in prices)


def _computing_parts(operator: Operator) -> list[Operator]:
    """The operators with a price: those inside a hybrid, which beside text run one by one, or the operator itself."""
    if isinstance(operator, BlockOperator):
        return []
    inner = [part for child in operator.children() if isinstance(child, Operator) for part in _computing_parts(child)]
    return inner or [operator]


class _NoModules(contextlib.nullcontext):
    """In place of torch's tracker of modules, which nobody asks here, and which trips over views of parameters in
    no_grad.
    """

    parents = ("Global",)


class _Price:
    """What an operator costs by its own words, over all its calls, less what the counter saw inside it.

    Operators of blocks have none: they are counted right, for each of their streams.
    """

    def __init__(self, operator: Operator, counter: FlopCounterMode):
        self.operator, self.counter, self.seen_before, self.difference = operator, counter, 0, 0

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Listening inside."""
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
        self.seen_before = self.counter.get_total_flops()

    def _end(self, operator: Operator, args: tuple, output: torch.Tensor) -> None:
        batch, tokens = len(args[0]), args[0].shape[-2]
        others = args[1].shape[-2] - tokens if isinstance(operator, Mixer) else 0
        if others and not operator.honours_others:
            return  # keys of another sequence, of which its words do not tell: as the counter saw it
        softmax = 4 * tokens * others * operator.site.inner_width if others else 0
        seen = self.counter.get_total_flops() - self.seen_before
        self.difference += batch * (operator.flops(tokens) + softmax) - seen
