"""The edits of a graft as a card shows them: equal ones in one row, with their cost before and after."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.sites import BLOCK_KINDS
from ..errors import GraftError
from ..evaluation.cost import FLOP_FORMULAS
from ..injection.graft import Graft
from ..inspection import evaluating, example_inputs, predict, read_context
from ..operators import BlockOperator, Operator
from ..planning.plan import Edit

# Latents to count FLOPs over: a model made for 16,000 tokens would take minutes.
_LARGEST_SIZE = 32
_UNKNOWN_START = "not known"

Counts = dict[str, int]


def count_new_parameters(graft: Graft) -> str:
    """Return the number of values that a graft does not share with its base, as text."""
    count = 0
    for path in graft.seats:
        count += sum(tensor.numel() for tensor in graft.tensors_of(path).values())
    return f"{count:,}"


def draw_layers(graft: Graft) -> str:
    """Return the layers in a row for each kind: a block for a replaced part, a dot for an original one."""
    lines = []
    edits = [edit for edit in graft.plan.edits if edit.site.kind not in BLOCK_KINDS]
    for kind in dict.fromkeys(edit.site.kind for edit in edits):
        replaced = {edit.site.index for edit in edits if edit.site.kind == kind}
        drawn = ["·"] * len(graft.sites.where(kind=kind))
        for index in replaced:
            drawn[index] = "█"
        # the widest kind, cross_attention, has 15 letters
        lines.append(f"{kind:16} {''.join(drawn)}")
    edits_of_blocks = [edit for edit in graft.plan.edits if edit.site.kind in BLOCK_KINDS]
    if edits_of_blocks:
        lines.append(f"{'block':16} {_draw_blocks(graft, edits_of_blocks)}")
    return "\n".join(lines)


def _draw_blocks(graft: Graft, edits: list[Edit]) -> str:
    """Return the blocks in a row: in brackets those that run side by side, a cross for a removed one."""
    drawn = {site.path: "·" for site in graft.sites.where(kind="block")}
    for edit in edits:
        operator_class = edit.config.owner
        assert issubclass(operator_class, BlockOperator)
        if not operator_class.runs_blocks:
            drawn |= dict.fromkeys(edit.site.paths, "×")
            continue
        drawn |= dict.fromkeys(edit.site.paths, "█")
        first = edit.site.path
        last = edit.site.paths[-1]
        drawn[first] = f"({drawn[first]}"
        drawn[last] = f"{drawn[last]})"
    return "".join(drawn.values())


def group_edits(edits: Iterable[Edit]) -> dict[tuple[str, str], list[Edit]]:
    """Return edits by kind of site and operator with its settings, as text."""
    groups: dict[tuple[str, str], list[Edit]] = {}
    for edit in edits:
        groups.setdefault((edit.site.kind, str(edit.config)), []).append(edit)
    return groups


def rule_keys(edits: Sequence[Edit]) -> list[str]:
    """Return the rule keys that name the sites of edits of one kind: one, or for runs of blocks one each."""
    kind = edits[0].site.kind
    if kind == "block_run":
        return [edit.site.address for edit in edits]
    return [f"{kind}[{','.join(_ranges([edit.site.index for edit in edits]))}]"]


def _ranges(indices: list[int]) -> list[str]:
    """Return 0, 1, 2, 3 as 0:4, and 1, 3, 5 as 1:6:2; indices without equal steps one by one."""
    if len(indices) > 2:
        step = indices[1] - indices[0]
        if step > 0 and indices == list(range(indices[0], indices[-1] + 1, step)):
            suffix = f":{step}"
            return [f"{indices[0]}:{indices[-1] + 1}{suffix.removesuffix(':1')}"]
    return list(map(str, indices))


def edit_rows(
    model: ModelMixin, graft: Graft, *, is_imported: bool = False
) -> tuple[str | None, list[dict[str, str]]]:
    """Return in words over what FLOPs were counted, None where they were not, and a row for every group of edits.

    Args:
        is_imported: the parts were read from a checkpoint that does not say how they started.
    """
    counted_over, before, after = _count_flops(model, graft)
    rows = []
    for (_, operator), edits in group_edits(graft.plan.edits).items():
        paths = [path for edit in edits for path in edit.site.paths]
        row = {
            "sites": ", ".join(rule_keys(edits)),
            "count": str(len(edits)),
            "operator": operator,
            "start": _start(graft, edits[0], is_imported),
            "before": f"{sum(_parameters(graft.originals[path]) for path in paths):,}",
            "after": f"{sum(_parameters(graft.seats[path]) for path in paths):,}",
            "flops_before": _billions(before, paths),
            "flops_after": _billions(after, [edit.site.path for edit in edits]),
        }
        rows.append(row)
    return counted_over, rows


def _start(graft: Graft, edit: Edit, is_imported: bool) -> str:
    """Return in words what the new part started from."""
    if is_imported:
        return _UNKNOWN_START
    if edit.config.init != "warm":
        return "random weights"
    return graft.operators()[edit.site.path].start


def _parameters(part: nn.Module) -> int:
    # LoRA is listed by itself, and may be merged
    return sum(parameter.numel() for name, parameter in part.named_parameters() if ".lora_" not in name)


def _billions(counts: Counts, paths: list[str]) -> str:
    """Return the sum of counts in billions, empty where one is missing."""
    if not all(path in counts for path in paths):
        return ""
    return f"{sum(counts[path] for path in paths) / 1e9:.4g} G"


@torch.no_grad()
def _count_flops(model: ModelMixin, graft: Graft) -> tuple[str | None, Counts, Counts]:
    """Count the operations of each edited part in one forward of one sample, in the original and in the graft.

    The original is counted without its weights. Nothing is counted where a model's inputs are not known.
    """
    try:
        # other sizes than one number are those of models that make their example themselves
        size = getattr(model.config, "sample_size", None)
        size = min(size, _LARGEST_SIZE) if isinstance(size, int) else None
        inputs = example_inputs(model, size=size)
        grid = read_context(model, (), inputs).grid
        if grid is None:
            return None, {}, {}
        tokens = grid.tokens
        counts = _counts(model, inputs)
        after = {}
        for path, operator in graft.operators().items():
            counted = counts.get(f"{path}.graft", 0)
            after[path] = counts.get(path, 0) + _correction(counted, operator, tokens)
        config = json.dumps(dict(model.config), sort_keys=True, default=str)
        counts = _counts_of_original(type(model), config, size)
        before = {path: counts.get(path, 0) for path in graft.originals}
    # a card must not fail on a model whose call is not known
    except (GraftError, RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError, ValueError):
        return None, {}, {}
    return f"one forward of one sample of {tokens:,} tokens", before, after


def _correction(counted: int, operator: Operator, tokens: int) -> int:
    """Return the difference between an operator's `flops` and the counter's figure for it."""
    # the counter is right about operators of blocks, stream by stream
    if isinstance(operator, BlockOperator):
        return 0
    return operator.flops(tokens) - counted


@functools.lru_cache(maxsize=8)  # a model in training is saved often
def _counts_of_original(cls: type[ModelMixin], config: str, size: int | None) -> Counts:
    """Count the operations of the modules of the model that a configuration describes, without weights."""
    with torch.device("meta"):
        original = cls.from_config(json.loads(config))  # pyright: ignore[reportAttributeAccessIssue]  # a ConfigMixin too
    # buffers that a constructor computes are not made on the default device
    original = original.to("meta").eval()
    return _counts(original, example_inputs(original, size=size))


def _counts(model: ModelMixin, inputs: dict[str, Any]) -> Counts:
    """Return torch's count of the operations in each module of a model, by path."""
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with evaluating(model), counter:
        predict(model, inputs)
    root = f"{type(model).__name__}."
    return {name.removeprefix(root): sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
