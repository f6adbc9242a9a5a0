"""The edits of a graft as a card shows them: alike ones together, with what they cost before and after."""

from __future__ import annotations

import functools
import json
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

_LARGEST = 32  # latents: counting should not cost minutes where a model was made for 16,000 tokens


def own_parameters(graft: Graft) -> str:
    """How many values a graft has of its own."""
    return f"{sum(t.numel() for path in graft.seats for t in graft.tensors_of(path).values()):,}"


def strip(graft: Graft) -> str:
    """The layers drawn in a row for each kind: a block for a replaced part, a dot for one that is left alone."""
    lines = []
    for kind in dict.fromkeys(edit.site.kind for edit in graft.plan.edits if edit.site.kind not in BLOCK_KINDS):
        replaced = {edit.site.index for edit in graft.plan.edits if edit.site.kind == kind}
        layers = range(len(graft.sites.where(kind=kind)))
        lines.append(f"{kind:16} {''.join('█' if index in replaced else '·' for index in layers)}")
    if blocks := [edit for edit in graft.plan.edits if edit.site.kind in BLOCK_KINDS]:
        lines.append(f"{'block':16} {_blocks_drawn(graft, blocks)}")
    return "\n".join(lines)


def _blocks_drawn(graft: Graft, edits: list[Edit]) -> str:
    """Blocks in brackets run side by side, a cross stands for one that is gone."""
    drawn = {site.path: "·" for site in graft.sites.where(kind="block")}
    for edit in edits:
        first, *_, last = [edit.site.path, *edit.site.paths]
        runs = edit.config.owner.runs_blocks
        drawn |= dict.fromkeys(edit.site.paths, "█" if runs else "×")
        if runs:
            drawn[first], drawn[last] = f"({drawn[first]}", f"{drawn[last]})"
    return "".join(drawn.values())


def edit_rows(model: ModelMixin, graft: Graft) -> tuple[str | None, list[dict[str, str]]]:
    """Where FLOPs were counted, in words, and a row for every group of edits that are alike."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for edit in graft.plan.edits:
        groups.setdefault((edit.site.kind, str(edit.config)), []).append(edit)
    where, before, after = _flops(model, graft)
    rows = []
    for (kind, operator), edits in groups.items():
        paths = [path for edit in edits for path in edit.site.paths]
        start = graft.seats[paths[0]].graft.start if edits[0].config.init == "warm" else "random weights"
        rows.append(
            {
                "sites": _address(kind, edits),
                "count": str(len(edits)),
                "operator": operator,
                "start": start,
                "path": paths[0] + (" ..." if len(edits) > 1 else ""),
                "before": f"{sum(map(_parameters, (graft.originals[path] for path in paths))):,}",
                "after": f"{sum(map(_parameters, (graft.seats[path] for path in paths))):,}",
                "flops_before": _billions(before, paths),
                "flops_after": _billions(after, [edit.site.path for edit in edits]),
            }
        )
    return where, rows


def _address(kind: str, edits: list[Edit]) -> str:
    """The rule key of edits of one kind; of runs of blocks, which have a key each, all of them."""
    if kind == "block_run":
        return ", ".join(edit.site.address for edit in edits)
    return f"{kind}[{','.join(_ranges([edit.site.index for edit in edits]))}]"


def _parameters(part: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in part.named_parameters() if ".lora_" not in name)


def _ranges(indices: list[int]) -> list[str]:
    """0, 1, 2, 3 as 0:4; 1, 3, 5 as 1:6:2; what is no row of equal steps as it is."""
    step = indices[1] - indices[0] if len(indices) > 2 else 0
    if step > 0 and all(b - a == step for a, b in zip(indices, indices[1:], strict=False)):
        return [f"{indices[0]}:{indices[-1] + 1}" + (f":{step}" if step > 1 else "")]
    return list(map(str, indices))


def _billions(counts: dict[str, int], paths: list[str]) -> str:
    return f"{sum(counts[path] for path in paths) / 1e9:.4g} G" if all(path in counts for path in paths) else ""


@torch.no_grad()
def _flops(model: ModelMixin, graft: Graft) -> tuple[str | None, dict[str, int], dict[str, int]]:
    """Operations of each edited part in one forward of one sample, of the original and of the graft.

    The original is counted without its weights. Nothing is told where a model's inputs are not known.
    """
    try:
        size = getattr(model.config, "sample_size", None)
        size = min(size, _LARGEST) if isinstance(size, int) else None
        inputs = example_inputs(model, size=size)
        grid = read_context(model, (), inputs).grid
        counts = _counts(model, inputs)
        after = {
            path: counts.get(path, 0) + _uncounted(counts.get(f"{path}.graft", 0), operator, grid.tokens)
            for path, operator in graft.operators().items()
        }
        counts = _counts_of_original(type(model), json.dumps(dict(model.config), sort_keys=True, default=str), size)
        before = {path: counts.get(path, 0) for path in graft.originals}
    except (GraftError, RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError, ValueError):
        return None, {}, {}
    return f"one forward of one sample of {grid.tokens:,} tokens", before, after


def _uncounted(counted: int, operator: Operator, tokens: int) -> int:
    """What an operator's own price adds to what the counter saw of it; block operators are counted right, stream by
    stream.
    """
    return 0 if isinstance(operator, BlockOperator) else operator.flops(tokens) - counted


@functools.lru_cache(maxsize=8)  # a model in training is saved often
def _counts_of_original(cls: type[ModelMixin], config: str, size: int | None) -> dict[str, int]:
    """Of the model that a configuration describes, without its weights."""
    with torch.device("meta"):
        bare = cls.from_config(json.loads(config))
    bare = bare.to("meta").eval()
    return _counts(bare, example_inputs(bare, size=size))


def _counts(model: ModelMixin, inputs: dict[str, Any]) -> dict[str, int]:
    """What torch's counter saw in each module of a model, by path."""
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with evaluating(model), counter:
        predict(model, inputs)
    root = f"{type(model).__name__}."
    return {name.removeprefix(root): sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
