"""Running a model without leaving a trace on it."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def predict(model: ModelMixin, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's prediction for one set of arguments."""
    return model(**inputs, return_dict=False)[0]
