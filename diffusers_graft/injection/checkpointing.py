"""Gradient checkpointing: blocks that run again see the context of their own forward.

Checkpointed blocks run again during the backward pass, when another forward may have been since. The `Context` of a
forward is no argument of a block, so the checkpoint does not store it with the inputs. Here it does: whatever function
a model checkpoints its blocks with, the second run sees the context of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin

from ..core.context import ContextSlot

_NAME = "_gradient_checkpointing_func"


class _WithContext:
    """A model's checkpointing function, called as `function(block, *arguments)`."""

    def __init__(self, function: Callable[..., Any], slot: ContextSlot):
        self.function = function
        self.slot = slot

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # Compiled code holds its context already.
            return self.function(block, *args, **kwargs)
        first = self.slot.current

        def run(*args: Any, **kwargs: Any) -> Any:
            present = self.slot.current
            self.slot.current = first
            # The backward pass may lie between two forwards that both go on.
            try:
                return block(*args, **kwargs)
            finally:
                self.slot.current = present

        return self.function(run, *args, **kwargs)


def remember_contexts(model: ModelMixin, slot: ContextSlot) -> None:
    """Wrap the checkpointing functions of a model. Called before every forward with gradients."""
    for module in model.modules():
        function = vars(module).get(_NAME)
        if function is not None and not isinstance(function, _WithContext):
            setattr(module, _NAME, _WithContext(function, slot))


def forget_contexts(model: ModelMixin) -> None:
    """Give the model its checkpointing functions back."""
    for module in model.modules():
        function = vars(module).get(_NAME)
        if isinstance(function, _WithContext):
            setattr(module, _NAME, function.function)
