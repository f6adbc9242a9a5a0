"""A proof of a graft: a seeded input with the model's output for it, replayed on load."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..core.storage import pack, parse_json, read_tensors, unpack
from ..errors import FileError, ModelError
from ..injection.install import require_graft
from ..inspection import evaluating, example_inputs, predict, read_context
from .limits import first_line
from .tensors import Tensors, require_finite

logger = logging.getLogger(__name__)

_RECIPE = "recipe"  # tensor of the JSON text that puts recorded arguments in their places
_SIDE = 4  # tokens: a forward over few of them shows as much, and costs little more than reading the weights
_MOST_TOKENS = 2**14  # of a recorded forward, so that replaying it takes seconds
_MOST_VALUES = 2**24


def _sizes(model: ModelMixin) -> Iterator[int | None]:
    """Yield latent sizes to try, from the smallest grid to the one the model was made for.

    A wide window needs more tokens than most operators.
    """
    full = getattr(model.config, "sample_size", None)
    patch = getattr(model.config, "patch_size", None)
    if not isinstance(full, int):
        yield None
        return
    if isinstance(patch, int):
        size = _SIDE * patch
        while size < full:
            yield size
            size *= 2
    yield full


@torch.no_grad()
def prove(model: ModelMixin) -> Tensors:
    """Return a seeded input and the model's output for it; for a family without example inputs, the last forward's.

    Empty, with a warning, where there are neither, or where the graft refuses them all: it is saved all the same.
    """
    reason = ""
    for inputs, tensors in _candidates(model):
        try:
            with evaluating(model):
                return {**tensors, "output": predict(model, inputs)}
        except Exception as refusal:
            # Whatever an operator cannot run on: no save is lost to its proof.
            reason = f" {first_line(refusal)}"
    if reason:
        logger.warning(f"The graft is saved without a proof, since it runs on no input known here.{reason}")
    return {}


def _candidates(model: ModelMixin) -> Iterator[tuple[dict[str, Any], Tensors]]:
    """Yield arguments of a forward with the tensors that hold them in a file, the cheapest first."""
    try:
        for size in _sizes(model):
            inputs = example_inputs(model, size=size)
            yield inputs, pack(inputs, "inputs")[1]
    except ModelError:
        yield from _recorded(model)


def _recorded(model: ModelMixin) -> Iterator[tuple[dict[str, Any], Tensors]]:
    """Yield the arguments of the last forward of the grafted model, if they can be stored and replayed."""
    # Pipelines ask for a tuple; how the output is wrapped is decided here.
    inputs = {
        name: value for name, value in (require_graft(model).slot.arguments or {}).items() if name != "return_dict"
    }
    reason = (
        f"No inputs are known for {type(model).__name__}: run it once with its graft, without gradients, then save."
    )
    if inputs:
        try:
            structure, tensors = pack(inputs, "inputs")
            _require_small(model, inputs, tensors)
            recipe = torch.frombuffer(bytearray(json.dumps(structure), "utf-8"), dtype=torch.uint8)
            yield inputs, {**{name: t.contiguous() for name, t in tensors.items()}, _RECIPE: recipe}
            return
        except Exception as error:  # no save is lost to its proof
            reason = first_line(error)
    logger.warning(f"The graft is saved without a proof. {reason}")


def _require_small(model: ModelMixin, inputs: dict[str, Any], tensors: Tensors) -> None:
    """Raise `FileError` for a forward that would take long to replay."""
    grid = read_context(model, (), inputs).grid
    values = sum(tensor.numel() for tensor in tensors.values())
    rows = [tensor.numel() // tensor.shape[-1] for tensor in tensors.values() if tensor.numel() and tensor.dim()]
    tokens = values
    if grid is not None:
        tokens = max([grid.tokens, *rows])
    if tokens > _MOST_TOKENS or values > _MOST_VALUES:
        raise FileError(
            f"A proof is a forward over at most {_MOST_TOKENS:,} tokens; this one has {tokens:,}. "
            "Run the model once on a smaller input before saving."
        )


@torch.no_grad()
def replay(model: ModelMixin, path: Path) -> None:
    """Log the largest difference from the proven output, as a warning where it is large or there is no proof.

    Raises `FileError` for a proof that is damaged, or of other inputs than the model takes.
    """
    saved: Tensors = {}
    if path.exists():
        saved = read_tensors(path)
    if not saved:
        logger.warning(f"{path.parent} carries no proof; its outputs were not checked.")
        return
    if "output" not in saved:
        raise FileError(f"{path} is not a proof: it holds {sorted(saved)[:9]}, and no output.")
    require_finite(saved, path)
    try:
        inputs = _saved_inputs(model, saved, path)
        with evaluating(model):
            output = predict(model, inputs)
    except FileError:
        raise
    except Exception as error:  # whatever a model or an operator raises for inputs that it does not take
        raise FileError(f"{path} holds inputs that this model does not take: {first_line(error)}") from error
    expected = saved["output"].to(output.device, output.dtype)
    if output.shape != expected.shape:
        raise FileError(f"{path} holds an output of shape {tuple(expected.shape)}, not {tuple(output.shape)}.")
    difference = (output - expected).abs().max().item()
    level = logging.INFO
    if difference > 1e-3 * expected.abs().max().item():
        level = logging.WARNING
    logger.log(level, f"proof replayed: largest difference {difference:.3g}")


def _saved_inputs(model: ModelMixin, saved: Tensors, path: Path) -> dict[str, Any]:
    """Return the arguments that a file holds, of the shapes that a proof of ours has."""
    given = {name: tensor for name, tensor in saved.items() if name not in ("output", _RECIPE)}
    sizes = list(_sizes(model))
    latents = given.get("inputs.hidden_states")
    size = sizes[0]
    if latents is not None and latents.dim() and latents.shape[-1] in sizes:
        size = latents.shape[-1]
    try:
        inputs = example_inputs(model, size=size)
    except ModelError:
        return _unpack_recorded(model, saved, given, path)
    # Of the shapes that our proof would have: a forward over a huge input may never end.
    structure, tensors = pack(inputs, "inputs")
    if not given.keys() <= tensors.keys():
        raise FileError(f"{path} is not a proof for this model: it holds {sorted(given)[:9]}, not {sorted(tensors)}.")
    for name, tensor in given.items():
        like = tensors[name]
        if tensor.shape != like.shape:
            raise FileError(
                f"{path} holds inputs that this model does not take: {name} is {tuple(tensor.shape)}, not "
                f"{tuple(like.shape)}."
            )
        tensors[name] = tensor.to(like.device, like.dtype)
    return unpack(structure, tensors)


def _unpack_recorded(model: ModelMixin, saved: Tensors, given: Tensors, path: Path) -> dict[str, Any]:
    here = {name: tensor.to(model.device) for name, tensor in given.items()}
    for name, tensor in here.items():
        if tensor.is_floating_point():
            here[name] = tensor.to(model.dtype)
    try:
        structure = parse_json(saved[_RECIPE].numpy().tobytes().decode(), f"The recipe in {path}")
        inputs = unpack(structure, here)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path} is damaged: its inputs cannot be put together: {error!r}") from error
    if not isinstance(inputs, dict):
        raise FileError(f"{path} is damaged: its inputs are not arguments.")
    _require_small(model, inputs, here)
    return inputs
