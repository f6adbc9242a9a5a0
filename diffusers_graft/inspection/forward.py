"""Forwards of a model that leave no trace on it."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ..errors import ModelError


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block, and every module back into its mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def predict(model: ModelMixin, inputs: dict[str, Any], call: Callable[..., Any] | None = None) -> torch.Tensor:
    """Return the model's prediction for one set of arguments; a list of samples of one size becomes one batch.

    Args:
        inputs: arguments by name.
        call: what runs the model, where something is wrapped around it.
    """
    run = model if call is None else call
    arguments = dict(inputs)
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        # A pipeline may have passed one already.
        arguments["return_dict"] = False
    output = run(**arguments)
    while not isinstance(output, torch.Tensor):
        output = torch.stack(output) if _is_batch(output) else output[0]
    return output


def _is_batch(output: Any) -> bool:
    """Return whether an output is a list of tensors of one shape."""
    if not isinstance(output, list) or not all(isinstance(sample, torch.Tensor) for sample in output):
        return False
    return len({sample.shape for sample in output}) == 1


def pack_inputs(inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str]:
    """Arguments of a forward as tensors by number and a JSON text that puts them back in their places.

    Raises `ModelError` for arguments that are neither tensors nor JSON, such as a key-value cache.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, json.dumps(_packed(inputs, tensors))


def unpack_inputs(tensors: dict[str, torch.Tensor], recipe: str, model: ModelMixin) -> dict[str, Any]:
    """What `pack_inputs` packed, on the model's device and in its dtype. Raises `ValueError` for another text."""
    return _unpacked(json.loads(recipe), tensors, model)


def _packed(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name := f"inputs.{len(tensors)}"] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_packed(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ModelError(f"An argument of type {type(value).__name__} cannot be stored with a graft.")


def _unpacked(value: Any, tensors: dict[str, torch.Tensor], model: ModelMixin) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        tensor = tensors[content].to(model.device)
        return tensor.to(model.dtype) if tensor.is_floating_point() else tensor
    if kind == "dict":
        return {key: _unpacked(item, tensors, model) for key, item in content}
    items = [_unpacked(item, tensors, model) for item in content]
    return tuple(items) if kind == "tuple" else items
