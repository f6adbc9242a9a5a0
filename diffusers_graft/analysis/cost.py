"""What a model costs: parameters, and floating-point operations of one forward."""
from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from ..anatomy import evaluating, example_inputs, find_sites, read_context
from ..graft import installed, is_enabled
from ..operators import BlockOperator
from ..site import BLOCK_KINDS


def _softmax_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Two matrix products, from the shapes [B, H, N, E] of the queries and [B, H, M, E] of the keys."""
    batch, heads, tokens, width = query
    return 4 * batch * heads * tokens * key[2] * width


# torch's counter knows the softmax kernels of CUDA but not the one of CPUs.
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _softmax_flops}


def count_parameters(model: ModelMixin) -> int:
    """Parameters that run: those of the original parts are not counted while a graft stands in for them."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_depth(model: ModelMixin) -> int:
    """Blocks that run one after the other: those side by side are one, and what stands in for removed ones is none."""
    depth = len(find_sites(model, blocks=True).where(kind="block"))
    for edit in installed(model).plan.edits if is_enabled(model) else ():
        if edit.site.kind in BLOCK_KINDS:
            depth -= edit.site.blocks - edit.config.owner.runs_blocks
    return depth


@torch.no_grad()
def count_flops(model: ModelMixin, inputs: dict[str, Any] | None = None) -> int:
    """Floating-point operations of one forward, a multiply-add counting two.

    torch's counter sees matrix products, convolutions and softmax attention; it is blind to the rest, and it counts padding
    and tiles. Operators are therefore priced by their own `flops(tokens)`, and the counter prices everything around them.

    Args:
        inputs: arguments of the model; one example of its own size unless given.
    """
    inputs = inputs or example_inputs(model)
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    with evaluating(model), counter:
        model(**inputs, return_dict=False)
    total = counter.get_total_flops()
    if not is_enabled(model):
        return total
    counts, root = counter.get_flop_counts(), type(model).__name__
    grid = read_context(model, (), inputs).grid
    for path, operator in installed(model).operators().items():
        if isinstance(operator, BlockOperator):  # counted right, for each of its streams
            continue
        total -= sum(counts.get(f"{root}.{path}.graft", {}).values())
        total += operator.flops(grid.tokens) * len(inputs["hidden_states"])
    return total
