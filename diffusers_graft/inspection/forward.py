"""Forwards of a model that leave no trace on it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from .families import argument_names, family_of


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block, and every module back into its mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # `model.train` would set one mode for all modules.
        for module, mode in modes.items():
            module.training = mode


def predict(model: ModelMixin, inputs: dict[str, Any], call: Callable[..., Any] | None = None) -> torch.Tensor:
    """Return the model's prediction for one set of arguments; a list of samples of one size becomes one batch.

    Args:
        inputs: arguments by name.
        call: what runs the model, where something is wrapped around it.
    """
    arguments = dict(inputs)
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        # A pipeline may have passed one already.
        arguments["return_dict"] = False
    # Not `call or model`: a compiled module is asked for its length then, which it has not.
    run = model if call is None else call
    output = run(**arguments)
    # Some families put their one answer into several tuples.
    while not isinstance(output, torch.Tensor):
        output = torch.stack(output) if _is_batch(output) else output[0]
    if family_of(model).answers_text:
        # Pipelines keep the answer for the image alone.
        noisy = inputs[argument_names(type(model))[0]]
        output = output[:, -noisy.shape[1] :]
    return output


def _is_batch(output: Any) -> bool:
    """Return whether an output is a list of tensors of one shape."""
    if not isinstance(output, list) or not all(isinstance(sample, torch.Tensor) for sample in output):
        return False
    return len({sample.shape for sample in output}) == 1
