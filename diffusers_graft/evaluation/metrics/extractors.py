"""Networks that give features of images, whatever they are, and how one of them is told from another."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...inspection import evaluating

# Names of outputs; a network with one output gives that for all of them.
FEATURES = "features"
SPATIAL = "spatial"
LOGITS = "logits"


@torch.no_grad()
def extract(extractor: nn.Module, images: torch.Tensor, output: str) -> torch.Tensor:
    """Return one output of an extractor, as float32 on the CPU.

    Args:
        images: [B, C, H, W] in [0, 1].
        output: name of one of several outputs; a network with one output gives that for any name.

    Raises `ModelError` for an output that the network has not, or that is no table [B, F] of finite numbers.
    """
    return select_output(run_extractor(extractor, images), output, extractor, len(images))


@torch.no_grad()
def run_extractor(extractor: nn.Module, images: torch.Tensor) -> Any:
    """Return all outputs of an extractor, which is in evaluation mode meanwhile."""
    tensor = next(iter([*extractor.parameters(), *extractor.buffers()]), torch.empty(0))
    with evaluating(extractor):
        return extractor(images.to(tensor.device))


def select_output(outputs: Any, output: str, extractor: nn.Module, count: int) -> torch.Tensor:
    """Return one output by name, as `extract` does."""
    name = type(extractor).__name__
    if isinstance(outputs, dict):
        if output not in outputs:
            raise ModelError(f"{name} gives {', '.join(outputs)}; the metric needs {output!r}.")
        outputs = outputs[output]
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or len(outputs) != count:
        shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ModelError(f"An extractor gives features [B, F] for B images; {name} gave {shape} for {count}.")
    # One image that is not finite would make every score so, after all samples are drawn.
    if not outputs.isfinite().all():
        raise ModelError(f"{name} gives features that are not finite. Check its weights and the images.")
    return outputs.detach().float().cpu()


def describe_network(network: nn.Module) -> str:
    """Return class and weights of a network in words that tell one network from another."""
    # All of the weights: networks that were finetuned on little differ in little.
    hasher = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        hasher.update(f"{name} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().float().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{type(network).__name__} {hasher.hexdigest()[:12]}"
