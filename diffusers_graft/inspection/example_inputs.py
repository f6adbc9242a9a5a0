"""Inputs small enough to try a model on, for the families whose arguments are known here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin

from ..errors import GeometryError, ModelError
from .grids import Inputs


def example_inputs(
    model: ModelMixin, *, batch_size: int = 1, size: int | None = None, text_tokens: int = 12, seed: int = 0
) -> Inputs:
    """Make random but reproducible arguments for `model(**inputs)`, on the model's device and in its dtype.

    Args:
        size: height and width of the latents; the size the model was made for unless given.
        text_tokens: of a prompt, where the model takes one.

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
        size = int(getattr(model.config, "sample_size", _NATIVE_SIZE))
    # Flux is given its patches, of 2 x 2, packed.
    patch = max(model.config.patch_size, 2 if "FluxTransformer2DModel" in names else 1)
    if size < patch:
        raise GeometryError(
            f"Latents of {size} x {size} hold no patch of {patch} x {patch}. Ask for a size from {patch}."
        )
    inputs = make(model, batch_size, size, text_tokens, torch.Generator().manual_seed(seed))
    # Positions are read for their values, which tensors on the meta device do not have.
    positions = {name: inputs[name] for name in _POSITIONS if name in inputs and model.device.type == "meta"}
    return {name: _move(value, model) for name, value in inputs.items()} | positions


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


def _dit_inputs(model: ModelMixin, batch_size: int, size: int, text_tokens: int, generator: torch.Generator) -> Inputs:
    # Drawn before the latents: saved proofs hold outputs for this order of draws.
    labels = torch.randint(model.config.num_embeds_ada_norm, (batch_size,), generator=generator)
    return {**_latents(model, batch_size, size, generator), "class_labels": labels}


def _pixart_inputs(
    model: ModelMixin, batch_size: int, size: int, text_tokens: int, generator: torch.Generator
) -> Inputs:
    width = model.config.caption_channels or model.config.cross_attention_dim
    conditions: Inputs = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        conditions = {"resolution": torch.full((batch_size, 2), 8.0 * size), "aspect_ratio": torch.ones(batch_size, 1)}
    return {
        **_latents(model, batch_size, size, generator),
        "encoder_hidden_states": torch.randn(batch_size, text_tokens, width, generator=generator),
        "encoder_attention_mask": torch.ones(batch_size, text_tokens),
        "added_cond_kwargs": conditions,
    }


def _flux_inputs(
    model: ModelMixin, batch_size: int, size: int, text_tokens: int, generator: torch.Generator
) -> Inputs:
    side = size // 2
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
    inputs: Inputs = {
        "hidden_states": torch.randn(batch_size, side * side, model.config.in_channels, generator=generator),
        "timestep": torch.rand(batch_size, generator=generator),
        "encoder_hidden_states": torch.randn(
            batch_size, text_tokens, model.config.joint_attention_dim, generator=generator
        ),
        "pooled_projections": torch.randn(batch_size, model.config.pooled_projection_dim, generator=generator),
        "img_ids": positions.float(),
        "txt_ids": torch.zeros(text_tokens, 3),
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = torch.full((batch_size,), 3.5)
    return inputs


_POSITIONS = ("img_ids", "txt_ids")
# Of latents, where a configuration does not say: those of 1,024 x 1,024 pixels.
_NATIVE_SIZE = 128

_EXAMPLES: dict[str, Callable[[ModelMixin, int, int, int, torch.Generator], Inputs]] = {
    "DiTTransformer2DModel": _dit_inputs,
    "PixArtTransformer2DModel": _pixart_inputs,
    "FluxTransformer2DModel": _flux_inputs,
}
