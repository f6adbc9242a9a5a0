"""Gradient checkpointing runs blocks again during the backward pass, when another forward may have been since.

What a part is told about its forward (`Context`) is no argument of a block, and so not kept with its inputs. Here it
is: whatever function a model checkpoints its blocks with, the second run is told what the first was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin

from ..core.context import ContextSlot

_NAME = "_gradient_checkpointing_func"


class _Remembering:
    """A model's checkpointing function, called as `function(block, *arguments)`."""

    def __init__(self, function: Callable[..., Any], slot: ContextSlot):
        self.function, self.slot = function, slot

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # compiled code holds its context already
            return self.function(block, *args, **kwargs)
        then = self.slot.current

        def told(*args: Any, **kwargs: Any) -> Any:
            now, self.slot.current = self.slot.current, then
            try:
                return block(*args, **kwargs)
            finally:
                self.slot.current = now

        return self.function(told, *args, **kwargs)


def remember_contexts(model: ModelMixin, slot: ContextSlot) -> None:
    """See that blocks which run again are told what they were told first. Called before every forward with gradients."""
    for module in model.modules():
        function = vars(module).get(_NAME)
        if function is not None and not isinstance(function, _Remembering):
            setattr(module, _NAME, _Remembering(function, slot))


def forget_contexts(model: ModelMixin) -> None:
    """Give the model its own functions back."""
    for module in model.modules():
        function = vars(module).get(_NAME)
        if isinstance(function, _Remembering):
            setattr(module, _NAME, function.function)
