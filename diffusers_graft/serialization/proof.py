"""A seeded input with the model's output for it: what a shared graft proves itself by."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..errors import FileError, ModelError
from ..injection.graft import get_graft
from ..inspection import evaluating, example_inputs, pack_inputs, predict, unpack_inputs
from .tensors import read_tensors

logger = logging.getLogger(__name__)

_RECIPE = "recipe"  # tensor of the JSON text that puts recorded arguments in their places
_SIDE = 4  # tokens: a forward over few of them tells as much, and costs little more than reading the weights


def _sizes(model: ModelMixin) -> Iterator[int | None]:
    """Latents to try, from the smallest grid to the one the model was made for: a wide window needs more tokens than
    most.
    """
    full, patch = (getattr(model.config, name, None) for name in ("sample_size", "patch_size"))
    size = _SIDE * patch if isinstance(patch, int) else math.inf
    while isinstance(full, int) and size < full:
        yield size
        size *= 2
    yield full if isinstance(full, int) else None


@torch.no_grad()
def prove(model: ModelMixin) -> dict[str, torch.Tensor]:
    """A seeded input and the model's output for it; of a family without example inputs, those of the last forward.

    Empty, with a warning, where there are neither, or where the graft refuses them all: it is saved all the same.
    """
    why = ""
    for inputs, tensors in _to_prove_by(model):
        try:
            with evaluating(model):
                return {**tensors, "output": predict(model, inputs)}
        except Exception as refusal:  # whatever an operator cannot run on, no save is lost to its proof
            why = f" {refusal}"
    if why:
        logger.warning(f"The graft is saved without a proof, since it runs on no input known here.{why}")
    return {}


def _to_prove_by(model: ModelMixin) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Arguments of a forward, and the tensors that hold them in a file; the cheapest first."""
    try:
        for size in _sizes(model):
            inputs = example_inputs(model, size=size)
            yield inputs, _flat(inputs)
        return
    except ModelError:
        inputs = get_graft(model).slot.arguments or {}
    why = f"No inputs are known for {type(model).__name__}: run it once with its graft, without gradients, then save."
    try:
        tensors, recipe = pack_inputs(inputs)
    except ModelError as error:
        inputs, why = {}, str(error)
    if not inputs:
        logger.warning(f"The graft is saved without a proof. {why}")
        return
    yield inputs, {**tensors, _RECIPE: torch.frombuffer(bytearray(recipe, "utf-8"), dtype=torch.uint8)}


@torch.no_grad()
def replay(model: ModelMixin, path: Path) -> None:
    """Log the largest difference from the proven output, as a warning where it is large or there is no proof.

    Raises `FileError` for a proof that is damaged, or of other inputs than the model takes.
    """
    saved = read_tensors(path) if path.exists() else {}
    if not saved:
        logger.warning(f"{path.parent} carries no proof; its outputs were not checked.")
        return
    if "output" not in saved:
        raise FileError(f"{path} is no proof: it holds {sorted(saved)}, and no output.")
    inputs = _proven(model, saved, path)
    try:
        with evaluating(model):
            output = predict(model, inputs)
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        raise FileError(f"{path} holds inputs that this model does not take: {error}") from error
    expected = saved["output"].to(output.device, output.dtype)
    if output.shape != expected.shape:
        raise FileError(f"{path} holds an output of shape {tuple(expected.shape)}, not {tuple(output.shape)}.")
    difference = (output - expected).abs().max().item()
    level = logging.INFO if difference <= 1e-3 * expected.abs().max().item() else logging.WARNING
    logger.log(level, f"proof replayed: largest difference {difference:.3g}")


def _proven(model: ModelMixin, saved: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """The arguments that a file holds."""
    try:
        inputs = example_inputs(model, size=next(_sizes(model)))
    except ModelError:
        try:
            return unpack_inputs(saved, bytes(saved[_RECIPE].tolist()).decode(), model)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(f"{path} is damaged: its inputs cannot be put together: {error!r}") from error
    wanted = {name: tensor.shape for name, tensor in _flat(inputs).items()}
    given = {name: tensor.shape for name, tensor in saved.items() if name != "output"}
    if not set(given) <= set(wanted):
        raise FileError(
            f"{path} is no proof for this model: it holds {sorted(saved)}, not {sorted([*wanted, 'output'])}."
        )
    return _unflat(inputs, saved)


def _flat(inputs: dict[str, Any], prefix: str = "inputs.") -> dict[str, torch.Tensor]:
    tensors = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            tensors.update(_flat(value, f"{prefix}{name}."))
        elif isinstance(value, torch.Tensor):
            tensors[prefix + name] = value
    return tensors


def _unflat(inputs: dict[str, Any], saved: dict[str, torch.Tensor], prefix: str = "inputs.") -> dict[str, Any]:
    """The example inputs, their tensors replaced by the saved ones."""
    filled = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            value = _unflat(value, saved, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor) and prefix + name in saved:
            value = saved[prefix + name].to(value.device, value.dtype)
        filled[name] = value
    return filled
