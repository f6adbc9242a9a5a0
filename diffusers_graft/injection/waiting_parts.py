"""Parts that wait off the module tree, and what they miss there.

While a graft runs, the originals wait; while it is disabled, its seats do. Casts, moves, modes and LoRA reach what is
in the tree alone, so a part that comes back first follows the part that leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ..errors import StateError
from .module_copy import is_quantised

# Quantised and fp8 weights are stored, not computed with; a new part takes the model's dtype there.
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_DEPARTURE = "_graft_departure"


@dataclass(frozen=True)
class TreeState:
    """The facts about a model's tree that a part off the tree would miss.

    Attributes:
        requires_grad: of all base weights, or None where some are trained and some are not.
        quantised: names of the quantised weights.
    """

    requires_grad: bool | None
    quantised: frozenset[str]

    @classmethod
    def of(cls, model: ModelMixin) -> TreeState:
        trained = set()
        quantised = set()
        for name, weight in model.named_parameters():
            if ".graft." not in name and ".lora_" not in name:
                trained.add(weight.requires_grad)
            if is_quantised(weight):
                quantised.add(name)
        is_uniform = len(trained) == 1
        return cls(trained.pop() if is_uniform else None, frozenset(quantised))


@dataclass(frozen=True)
class _Departure:
    """The tree when a part left it, and the dtype of what took its place. Stored on the part."""

    tree: TreeState
    dtype: torch.dtype | None


def anchor_of(model: ModelMixin, part: nn.Module) -> nn.Parameter | None:
    """Return the parameter that tells the device of a part and the dtype that it computes in.

    The first one of the dtype that most of its weights have, since some families keep tables and norms in float32. A
    stand-in for a removed block has no weights, so the model's tell. None where all are quantised or fp8: what is
    only stored says nothing.
    """
    parameters = list(part.parameters()) or list(model.parameters())
    parameters = [parameter for parameter in parameters if parameter.dtype in COMPUTE_DTYPES]
    sizes: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        sizes[parameter.dtype] += parameter.numel()
    if not sizes:
        return None
    dtype = sizes.most_common(1)[0][0]
    return next(parameter for parameter in parameters if parameter.dtype == dtype)


def refuse_newly_quantised(model: ModelMixin, tree: TreeState, parts: Iterable[nn.Module]) -> None:
    """Raise `StateError` where the model was quantised while a part waited, which would come back as it was."""
    in_tree = {id(weight) for weight in model.parameters()}
    for part in parts:
        departure: _Departure | None = vars(part).get(_DEPARTURE)
        if departure is None or tree.quantised <= departure.tree.quantised:
            continue
        if any(id(weight) not in in_tree and not is_quantised(weight) for weight in part.parameters()):
            new = min(tree.quantised - departure.tree.quantised)
            raise StateError(
                f"The model was quantised ({new}) while parts of it waited off the tree, and those would come back in "
                "full precision. Load the base again, quantise it, and graft it then."
            )


def follow(model: ModelMixin, tree: TreeState, leaving: nn.Module, coming: nn.Module) -> None:
    """Bring a part that waited in step with the model, without touching what both parts share."""
    _align_lora(leaving, coming)
    _align_backends(leaving, coming)
    # Parts of it may have modes of their own, which stay where the mode as such is the same.
    if coming.training != leaving.training:
        coming.train(leaving.training)
    departure: _Departure | None = vars(coming).pop(_DEPARTURE, None)
    here = anchor_of(model, leaving)
    if here is None:
        return
    counterparts = dict(leaving.named_parameters())
    shared = {id(parameter) for parameter in counterparts.values()}
    # Parameters of several dtypes keep theirs, unless the model was cast meanwhile.
    was_cast = departure is None or departure.dtype != here.dtype
    # So are they frozen, or thawed, where all of the model was.
    was_frozen = departure is not None and tree.requires_grad not in (None, departure.tree.requires_grad)
    for name, parameter in coming.named_parameters():
        if id(parameter) in shared:
            continue
        like = counterparts.get(name, here)
        if like.dtype not in COMPUTE_DTYPES:
            like = here
        dtype = like.dtype if was_cast or like is not here else parameter.dtype
        if (parameter.device, parameter.dtype) != (like.device, dtype):
            parameter.data = parameter.data.to(like.device, dtype)
        if was_frozen and ".lora_" not in name:
            assert tree.requires_grad is not None
            parameter.requires_grad_(tree.requires_grad)
    there = anchor_of(model, coming)
    vars(leaving)[_DEPARTURE] = _Departure(tree, getattr(there, "dtype", None))


def _align_lora(leaving: nn.Module, coming: nn.Module) -> None:
    """Give a part the layers that it shares with the other, where LoRA was put around them or taken off meanwhile."""
    layers = dict(coming.named_modules())
    for path, layer in leaving.named_modules():
        other = layers.get(path, layer)
        if path and other is not layer and base_layer(other) is base_layer(layer):
            coming.set_submodule(path, layer)


def _align_backends(leaving: nn.Module, coming: nn.Module) -> None:
    """Give processors the attention backend that was set, or reset, for those they replace."""
    modules = dict(coming.named_modules())
    for path, module in leaving.named_modules():
        processor: Any = getattr(module, "processor", None)
        other: Any = getattr(modules.get(path), "processor", None)
        if hasattr(processor, "_attention_backend") and hasattr(other, "_attention_backend"):
            other._attention_backend = processor._attention_backend


def base_layer(layer: nn.Module) -> nn.Module:
    """Return the layer that LoRA was put around, or the layer itself."""
    return getattr(layer, "base_layer", layer)
