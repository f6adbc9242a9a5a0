"""Inputs small enough to try a model on, for the families whose arguments are known here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin

from ..errors import GeometryError, ModelError
from .grids import Inputs


def example_inputs(model: ModelMixin, *, batch_size: int = 1, size: int | None = None, seed: int = 0) -> Inputs:
    """Make random but reproducible arguments for `model(**inputs)`, on the model's device and in its dtype.

    Args:
        size: height and width of the latents; the size the model was made for unless given.

    Raises:
        ModelError: a family whose arguments are not known here.
        GeometryError: latents smaller than a patch.
    """
    # By name: importing the classes takes seconds.
    names = [cls.__name__ for cls in type(model).__mro__]
    make = next((_EXAMPLES[name] for name in names if name in _EXAMPLES), None)
    if make is None:
        known = ", ".join(_EXAMPLES)
        raise ModelError(
            f"No example inputs are known for {type(model).__name__}, only for {known}. Give inputs of your own, "
            "or add a row to diffusers_graft/inspection/example_inputs.py."
        )
    if size is None:
        size = int(model.config.sample_size)
    patch = model.config.patch_size
    if size < patch:
        raise GeometryError(
            f"Latents of {size} x {size} hold no patch of {patch} x {patch}. Ask for a size from {patch}."
        )
    inputs = make(model, batch_size, size, torch.Generator().manual_seed(seed))
    return {name: _move(value, model) for name, value in inputs.items()}


def _move(value: Any, model: ModelMixin) -> Any:
    """Return a value on the model's device, tensors of floating point in its dtype."""
    if isinstance(value, dict):
        return {name: _move(item, model) for name, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return value.to(model.device, model.dtype)
    return value.to(model.device)


def _latents(model: ModelMixin, batch_size: int, size: int, generator: torch.Generator) -> Inputs:
    return {
        "hidden_states": torch.randn(batch_size, model.config.in_channels, size, size, generator=generator),
        "timestep": torch.randint(1, 1000, (batch_size,), generator=generator),
    }


def _dit_inputs(model: ModelMixin, batch_size: int, size: int, generator: torch.Generator) -> Inputs:
    # Drawn before the latents: saved proofs hold outputs for this order of draws.
    labels = torch.randint(model.config.num_embeds_ada_norm, (batch_size,), generator=generator)
    return {**_latents(model, batch_size, size, generator), "class_labels": labels}


def _pixart_inputs(model: ModelMixin, batch_size: int, size: int, generator: torch.Generator) -> Inputs:
    width = model.config.caption_channels or model.config.cross_attention_dim
    conditions: Inputs = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        conditions = {"resolution": torch.full((batch_size, 2), 8.0 * size), "aspect_ratio": torch.ones(batch_size, 1)}
    return {
        **_latents(model, batch_size, size, generator),
        "encoder_hidden_states": torch.randn(batch_size, 12, width, generator=generator),
        "encoder_attention_mask": torch.ones(batch_size, 12),
        "added_cond_kwargs": conditions,
    }


_EXAMPLES: dict[str, Callable[[ModelMixin, int, int, torch.Generator], Inputs]] = {
    "DiTTransformer2DModel": _dit_inputs,
    "PixArtTransformer2DModel": _pixart_inputs,
}
